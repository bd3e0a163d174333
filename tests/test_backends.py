"""The choice of a backend, and what it refuses."""

import pytest

from puzzlemoe_vllm.format.codes import CODES
from puzzlemoe_vllm.ops import backend_for, check_code


@pytest.fixture(autouse=True)
def _fresh_choice():
    backend_for.cache_clear()
    yield
    backend_for.cache_clear()


def test_a_cpu_gets_the_reference_which_reads_every_code():
    for code in CODES:
        check_code("cpu", code)
    assert backend_for("cpu").__name__.endswith("reference")


def test_kernels_that_do_not_read_a_code_say_what_to_do(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("PUZZLEMOE_BACKEND", "triton")
    check_code("cuda", "mask16")
    with pytest.raises(ValueError, match=r"triton kernels read mask16 words, not angle8: .*--code mask16.*unpack"):
        check_code("cuda", "angle8")


@pytest.mark.parametrize(
    ("choice", "message"), [("marlin", "choose one of cuda, triton, reference"), ("triton", "the model is on the CPU")]
)
def test_a_choice_that_cannot_serve_is_refused(monkeypatch, choice, message):
    monkeypatch.setenv("PUZZLEMOE_BACKEND", choice)
    with pytest.raises(ValueError, match=message):
        backend_for("cpu")
