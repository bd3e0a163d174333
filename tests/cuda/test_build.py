"""What of the CUDA backend can be checked without a GPU."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from puzzlemoe_vllm.backends import cuda
from puzzlemoe_vllm.format.codes import CODES, Decoder, TrellisCode, get_code

CUDA = Path(__file__).parents[2] / "cuda"


def test_library_states_its_reason_when_it_cannot_be_used(tmp_path, monkeypatch):
    cuda.load_library.cache_clear()
    monkeypatch.setenv(cuda.LIBRARY_VARIABLE, str(tmp_path / "absent.so"))
    with pytest.raises(cuda.Unavailable, match="does not exist"):
        cuda.load_library()
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    monkeypatch.setenv(cuda.LIBRARY_VARIABLE, str(broken))
    with pytest.raises(cuda.Unavailable, match="cannot be loaded"):
        cuda.load_library()
    cuda.load_library.cache_clear()
    assert "not an NVIDIA GPU" in cuda.unavailable(torch.device("cpu"))


def test_flags_name_every_architecture_and_ptx(build):
    flags = build.targets(CUDA / "sm80_gemm.cu", build.ARCHES)
    codes = [flag.rsplit("=", 1)[1] for flag in flags]
    assert codes[:6] == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
    assert codes[6:] == ["compute_90", "compute_120"]
    assert build.targets(CUDA / "sm90" / "wgmma64.cu", build.ARCHES) == ["-gencode=arch=compute_90a,code=sm_90a"]


def test_build_without_nvcc_says_what_to_do(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    monkeypatch.delenv("NVCC", raising=False)
    with pytest.raises(FileNotFoundError, match="CUDA toolkit"):
        build.build_library(tmp_path / "library.so")


def test_a_source_distribution_holds_what_the_library_is_built_from(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=CUDA.parent, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        held = {Path(*Path(name).parts[1:]) for name in files.getnames()}
    sources = {path.relative_to(CUDA.parent) for path in CUDA.rglob("*.*") if path.suffix != ".pyc"}
    assert {path.parent.name for path in sources} == {"cuda", "sm90"} and sources <= held


def test_library_builds_and_answers_without_a_gpu(cuda_library):
    assert ctypes.CDLL(str(cuda_library.path)).pm_abi_version() == cuda.ABI_VERSION
    command = ["nm", "-D", "--undefined-only", cuda_library.path]
    undefined = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "torch" not in undefined.stdout and "Py" not in undefined.stdout and "cudart" not in undefined.stdout


def test_the_dispatch_table_names_kernels_of_the_library(cuda_library, loaded):
    loaded(cuda_library.path)
    for capability, code in itertools.product((80, 90), CODES.values()):
        rows = cuda._dispatch_rows(capability, cuda.kind_of(code))
        assert all(cuda.kernel_takes(kernel, code) for _, kernel in rows)
        assert cuda.served_capability(capability) == capability


def test_kernels_say_which_codes_they_take(cuda_library, loaded):
    loaded(cuda_library.path)
    takes = {kernel: {name for name, code in CODES.items() if cuda.kernel_takes(kernel, code)} for kernel in
             cuda.kernel_names()}  # fmt: skip
    trellises = {name for name, code in CODES.items() if isinstance(code, TrellisCode)}
    assert takes.pop("sm90_fp8_256") == {"angle8", "angle6"}
    assert takes.pop("sm90_imma8") == trellises
    assert takes.pop("sm90_wgmma48") == takes.pop("sm90_mma8") == set(CODES) - trellises
    assert all(codes == set(CODES) for codes in takes.values())
    with pytest.raises(ValueError, match=r"has no kernel sm90_mma16, but sm80_mma8, .*sm90_wgmma128"):
        cuda.kernel_takes("sm90_mma16", get_code("angle8"))


LAYER = {"tokens": 3, "topk": 2, "hidden": 256, "intermediate": 128, "pairs": 2, "group_size": 128}


@pytest.mark.parametrize(
    "kernel, code, changes, reason",
    [
        ("sm80_mma8", Decoder.TABLE8, {"tokens": 1 << 27, "topk": 32}, "more than 2^31 - 1 (token, expert) slots"),
        ("sm80_mma8", Decoder.TABLE8, {"tokens": -1}, "below 0"),
        ("sm80_mma8", Decoder.TABLE8, {"topk": 33}, "more than 32 experts per token"),
        ("sm80_mma8", Decoder.TABLE8, {"pairs": 1 << 30}, "more than 512 experts"),
        ("sm80_mma8", Decoder.TABLE8, {"pairs": 256, "dense": 1}, "more than 512 experts"),
        ("sm80_mma8", Decoder.TABLE8, {"group_size": 16}, "group_size 128, 64 or 32"),
        ("sm80_mma8", Decoder.TRELLIS3, {"hidden": 192}, "multiples of group_size"),
        ("sm80_mma8", Decoder.MASK16, {"intermediate": 24}, "multiples of 16"),
        ("sm80_mma8", Decoder.MASK16, {"hidden": 0}, "above 0"),
        ("sm80_mma8", 9, {}, "not built for words of this code"),
        ("sm90_imma8", Decoder.TABLE8, {}, "not built for words of this code"),
        ("sm90_fp8_256", Decoder.TRELLIS8, {"fp8_unit": 1.0}, "not built for words of this code"),
        ("sm90_fp8_256", Decoder.TABLE6, {}, "no values in e4m3"),
        ("sm90_fp8_256", Decoder.TABLE6, {"fp8_unit": 1.0, "hidden": 1 << 17}, "above 65536"),
    ],
)
def test_what_cannot_be_multiplied_is_refused_before_anything_starts(
    kernel, code, changes, reason, cuda_library, loaded
):
    loaded(cuda_library.path)
    library = cuda.load_library()
    layer = cuda._Layer(**LAYER | {"code": code, "kernel": cuda.kernel_names().index(kernel)} | changes)
    assert library.pm_scratch_bytes(layer) == -1
    assert library.pm_fused_experts(layer, None) != 0
    assert reason in library.pm_last_error().decode()


@pytest.mark.parametrize("tokens", [0, 1, 32768])
def test_scratch_grows_with_what_is_kept_in_it(tokens, cuda_library, loaded):
    """Sizes whose bytes no 32 bits hold."""
    loaded(cuda_library.path)
    library = cuda.load_library()
    sizes = {"tokens": tokens, "topk": 10, "hidden": 7168, "intermediate": 2048, "pairs": 256, "fp8_unit": 1.0}
    for number, kernel in enumerate(cuda.kernel_names()):
        code = get_code("angle8" if cuda.kernel_takes(kernel, get_code("angle8")) else "trellis4")
        layer = cuda._Layer(**LAYER | sizes | {"code": code.decoder, "kernel": number})
        kept = 2 * 10 * tokens * (7168 + 2048)
        assert kept <= library.pm_scratch_bytes(layer) < 1.5 * kept + (1 << 28)


def test_without_the_sm90_kernels_those_of_sm80_serve(cuda_library, loaded, tmp_path, caplog):
    path = tmp_path / "libpuzzlemoe_cuda.so"
    cuda_library.build.link_without_sm90(cuda_library.nvcc, cuda_library.objects, path, ["90"])
    loaded(path)
    assert cuda.kernel_names() == ("sm80_mma8", "sm80_mma16", "sm80_mma32", "sm80_mma64")
    for _ in range(2):
        assert cuda.served_capability(90) == 80 and cuda.choose_kernel(1e9, 80, get_code("angle8")) == "sm80_mma64"
    (line,) = caplog.messages
    assert "sm90_wgmma64" in line and "CUDA 13.3" in line
