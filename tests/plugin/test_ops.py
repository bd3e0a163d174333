"""The choice of a backend, and what it refuses."""

import pytest

from puzzlemoe_vllm.backends import cuda, wants_fp8_prefill
from puzzlemoe_vllm.format.codes import get_code
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
    code = get_code("angle8")
    check_backend("cuda", eager=True, code=code)
    with pytest.raises(ValueError, match=r"cannot be captured in CUDA graphs: add --enforce-eager"):
        check_backend("cuda", eager=False, code=code)
    check_backend("cpu", eager=False, code=code)


@pytest.fixture
def fp8(monkeypatch):
    """Asks for FP8 prefill."""
    monkeypatch.setenv("PUZZLEMOE_FP8_PREFILL", "1")
    wants_fp8_prefill.cache_clear()
    yield
    wants_fp8_prefill.cache_clear()


def test_fp8_is_refused_where_no_kernel_computes_in_it(fp8):
    with pytest.raises(ValueError, match=r"PUZZLEMOE_FP8_PREFILL=1: the reference backend has no kernels for e4m3"):
        check_backend("cpu", eager=False, code=get_code("angle8"))


@pytest.mark.parametrize("code", ["mask16", "angle16", "mask6"])
def test_fp8_is_refused_for_codes_without_e4m3_values(code):
    assert cuda.why_no_fp8(get_code(code)) == f"words of {code} have no values in e4m3"


def test_fp8_is_asked_for_by_one_and_by_nothing_else(fp8, monkeypatch):
    assert wants_fp8_prefill()
    monkeypatch.setenv("PUZZLEMOE_FP8_PREFILL", "yes")
    wants_fp8_prefill.cache_clear()
    with pytest.raises(ValueError, match="PUZZLEMOE_FP8_PREFILL=yes: give 1, or unset it"):
        wants_fp8_prefill()


def test_fp8_takes_many_tokens_alone():
    code = get_code("angle8")
    above, kernel = cuda._fp8_row(90)
    assert cuda.choose_kernel(above + 1, 90, code, fp8=True) == kernel
    assert cuda.choose_kernel(above, 90, code, fp8=True) == cuda.choose_kernel(above, 90, code) != kernel
    assert cuda.choose_kernel(above + 1, 80, code, fp8=True) == cuda.choose_kernel(above + 1, 80, code)
