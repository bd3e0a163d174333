"""The choice of a backend, and what it refuses."""

import pytest

from puzzlemoe_vllm.ops import backend_for, check_backend


@pytest.fixture(autouse=True)
def _fresh_choice():
    backend_for.cache_clear()
    yield
    backend_for.cache_clear()


def test_a_cpu_gets_the_reference():
    assert backend_for("cpu").__name__.endswith("reference")


@pytest.mark.parametrize(
    ("choice", "message"), [("marlin", "choose one of cuda, triton, reference"), ("triton", "the model is on the CPU")]
)
def test_a_choice_that_cannot_serve_is_refused(monkeypatch, choice, message):
    monkeypatch.setenv("PUZZLEMOE_BACKEND", choice)
    with pytest.raises(ValueError, match=message):
        backend_for("cpu")


def test_the_reference_on_a_gpu_needs_eager_mode(monkeypatch):
    monkeypatch.setenv("PUZZLEMOE_BACKEND", "reference")
    check_backend("cuda", eager=True)
    with pytest.raises(ValueError, match=r"cannot be captured in CUDA graphs: add --enforce-eager"):
        check_backend("cuda", eager=False)
    check_backend("cpu", eager=False)
