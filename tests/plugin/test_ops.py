"""The choice of a backend, and what it refuses."""

import pytest

from puzzlemoe_vllm.ops import backend_for


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
