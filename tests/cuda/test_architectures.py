"""That the kernels of compute capability 8.0 and later are translated for every architecture that the library names."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[2] / "cuda"
KERNEL = f"""#include "{CUDA}/sm80_gemm.cuh"
using Tile = Sm80Tile<16, 2, 4, 1, 128, 5>;
template __global__ void sm80_gemm<TableWords<8, 128>, Tile, false>(const __grid_constant__ GroupedGemm);
"""


@pytest.fixture
def nvcc(build) -> str:
    try:
        return build.find_nvcc()
    except FileNotFoundError:
        pytest.skip("nvcc is not installed")


@pytest.mark.parametrize("arch", ["80", "90", "100", "120"])
def test_a_kernel_and_its_ptx(arch, build, nvcc, tmp_path):
    assert arch in build.ARCHES
    source, ptx = tmp_path / "kernel.cu", tmp_path / "kernel.ptx"
    source.write_text(KERNEL)
    target = f"-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]"
    command = [nvcc, *build.FLAGS, target, "--keep", "--keep-dir", tmp_path, "-c", source, "-o", tmp_path / "kernel.o"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    text = ptx.read_text()
    assert re.search(rf"^\.target sm_{arch}$", text, re.M)
    assert "mma.sync.aligned.m16n8k16" in text and "wgmma" not in text and "cp.async.bulk" not in text
    assert ("griddepcontrol.wait" in text) == (int(arch) >= 90)
