"""What of the CUDA backend can be checked without a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from puzzlemoe_vllm.backends import cuda

CUDA = Path(__file__).parents[2] / "cuda"


def _module(name: str):
    """A module of the folder cuda/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"puzzlemoe_cuda_{name}", CUDA / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


sass = _module("check")


@pytest.fixture(scope="module")
def build():
    return _module("build")


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
    flags = build.targets("gemm_mma.cu", build.ARCHES)
    assert [flag.rsplit("=", 1)[1] for flag in flags] == ["sm_80", "sm_86", "sm_89", "sm_90", "compute_90"]
    assert build.targets("gemm_hopper.cu", build.ARCHES) == ["-gencode=arch=compute_90a,code=sm_90a"]


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
    sources = {path.relative_to(CUDA.parent) for path in CUDA.glob("*.*")}
    assert len(sources) > 5 and sources <= held


@pytest.fixture(scope="module")
def library(build, tmp_path_factory):
    try:
        build.find_nvcc()
    except FileNotFoundError:
        pytest.skip("nvcc is not installed")
    output = tmp_path_factory.mktemp("library") / "libpuzzlemoe_cuda.so"
    build.build_library(output, ["90"])
    return output


def test_library_builds_and_answers_without_a_gpu(library):
    assert ctypes.CDLL(str(library)).pm_abi_version() == cuda.ABI_VERSION
    undefined = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    assert "torch" not in undefined.stdout and "Py" not in undefined.stdout and "cudart" not in undefined.stdout


def test_no_register_is_written_while_a_product_reads_it(library):
    """ptxas before CUDA 13.3 is known to reuse a wgmma's A registers too early in some kernels: not in these."""
    cuobjdump = sass.find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("cuobjdump is not installed")
    kernels = {name: code for name, code in sass.functions(cuobjdump, library).items() if "Wgmma" in name}
    assert len(kernels) == 2 * 3 * len(set(cuda.DECODERS.values()))  # products, tiles, decoders
    for name, code in kernels.items():
        assert any(instruction.opcode.startswith("HGMMA") for instruction in code), name
        assert not sass.overwritten_operands(code), name


def test_an_early_write_would_be_found():
    def program(left: str) -> list[sass.Instruction]:
        product = ("R24", "R56", "gdesc[UR8]", "R24", "gsb0")
        return [
            sass.Instruction(0, False, "HGMMA.64x64x16.F32.BF16", product),
            sass.Instruction(16, False, "HGMMA.64x64x16.F32.BF16", ("R24", "R60", *product[2:])),
            sass.Instruction(32, False, "WARPGROUP.DEPBAR.LE", ("gsb0", left)),
            sass.Instruction(48, False, "LOP3.LUT", ("R63", "R1", "R2", "R3")),
            sass.Instruction(64, True, "BRA", ("0x0",)),
            sass.Instruction(80, False, "EXIT", ()),
        ]

    assert [found.address for found in sass.overwritten_operands(program("0x1"))] == [48]
    assert not sass.overwritten_operands(program("0x0"))
