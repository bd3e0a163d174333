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

from puzzlemoe_vllm.backends import ExpertWeights, cuda
from puzzlemoe_vllm.format.codes import CODES, get_code

CUDA = Path(__file__).parents[2] / "cuda"


@pytest.mark.parametrize("gate_up", [False, True])
def test_tiles_hold_each_element_where_its_lane_reads_it(gate_up):
    rows, columns = 64, 48
    matrix = torch.arange(rows * columns, dtype=torch.int32).view(rows, columns)
    tiles = cuda.tile(matrix, gate_up)
    assert torch.equal(tiles.flatten().sort().values, matrix.flatten())
    for strip, column, lane, element in ((0, 0, 0, 0), (1, 2, 31, 7), (3, 1, 13, 2), (2, 0, 5, 5)):
        group, pair = lane // 4, lane % 4
        lower, right = element // 2 % 2, element // 4
        row = strip * 16 + group + 8 * lower
        if gate_up:
            row = strip * 8 + group + (rows // 2) * lower
        expected = matrix[row, column * 16 + 2 * pair + element % 2 + 8 * right]
        assert tiles[strip, column, lane * 8 + element] == expected


@pytest.mark.parametrize("strips, tiles", [(1, 1), (3, 5), (8, 4), (9, 3), (11, 22), (16, 8), (24, 6)])
def test_blocks_come_in_the_order_of_tile_offset(strips, tiles):
    """As tile_offset in grouped.cuh computes it."""
    numbered = torch.arange(strips * tiles).view(strips, tiles, 1)
    ordered = cuda.blocks(numbered)
    for strip, tile in itertools.product(range(strips), range(tiles)):
        first_strip, first_tile = strip // 8 * 8, tile // 4 * 4
        height, width = min(8, strips - first_strip), min(4, tiles - first_tile)
        offset = first_strip * tiles + first_tile * height + (strip - first_strip) * width + tile - first_tile
        assert ordered[offset] == numbered[strip, tile]


def test_kernel_words_swap_two_bits():
    words = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    kernel = cuda.kernel_words(words, "mask16")
    assert torch.equal(cuda.kernel_words(kernel, "mask16"), words)
    bit = lambda tensor, index: tensor.int() >> index & 1  # noqa: E731
    assert torch.equal(bit(kernel, 14), bit(words, 13)) and torch.equal(bit(kernel, 13), bit(words, 14))
    assert torch.equal(kernel & ~0x6000, words & ~0x6000)


def test_kernel_word_is_the_leaders_weight_times_2_to_16():
    """The identity that the kernels' decoding rests on, for every word with the leader's mask."""
    words = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    kernel = cuda.kernel_words(words, "mask16")
    for position in (0, 1):
        value = ((kernel.int() << 2 * position) & 0xC000) | (kernel.int() & 0x0FFF)
        scaled = value.to(torch.uint16).view(torch.bfloat16).double() / 65536
        exact = get_code("mask16").decode(words, position).double()
        assert torch.equal(scaled.where(exact != 0, 0), exact)
        assert scaled.where(exact == 0, 0).abs().max() < 4e-34


def test_six_bit_words_are_one_number_a_lane():
    """A lane's eight words: 48 bits, the lanes' lower 32 first, then their upper 16."""
    words = torch.randint(0, 64, (3, 2, 256), dtype=torch.uint8)
    kernel = cuda.kernel_words(words, "angle6")
    assert kernel.shape == (3, 2, 192)
    for lane in (0, 5, 31):
        number = sum(int(word) << 6 * i for i, word in enumerate(words[1, 1, lane * 8 : lane * 8 + 8]))
        lower, upper = kernel[1, 1, lane * 4 : lane * 4 + 4], kernel[1, 1, 128 + lane * 2 : 130 + lane * 2]
        assert bytes([*lower.tolist(), *upper.tolist()]) == number.to_bytes(6, "little")


def test_eight_bit_words_stay_as_they_are():
    words = torch.randint(0, 256, (3, 2, 256), dtype=torch.uint8)
    assert torch.equal(cuda.kernel_words(words, "angle8"), words)


def test_steps_come_in_the_order_of_the_strips():
    grid = torch.arange(64 * 3, dtype=torch.int32).view(64, 3)
    assert cuda.tile_steps(grid, False)[2, 1, 5, 1] == grid[16 + 5 + 8, 2]
    assert cuda.tile_steps(grid, True)[0, 3, 2, 1] == grid[32 + 3 * 8 + 2, 0]


def test_prepare_keeps_shapes_and_content():
    torch.manual_seed(0)
    words = [torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16) for shape in ((2, 64, 32), (2, 32, 32))]
    dense = [torch.randn(shape).bfloat16() for shape in ((1, 64, 32), (1, 32, 32))]
    weights = ExpertWeights(*(tensor.clone() for tensor in (*words, *dense)), expert_map=None, code="mask16")
    pointers = [tensor.data_ptr() for tensor in (weights.w13_pairs, weights.w2_dense)]
    cuda.prepare(weights)
    assert pointers == [tensor.data_ptr() for tensor in (weights.w13_pairs, weights.w2_dense)]
    restored = cuda.kernel_words(weights.w13_pairs, "mask16")
    assert torch.equal(restored.flatten().sort().values, words[0].flatten().sort().values)
    assert torch.equal(weights.w2_dense[0].flatten(), cuda.blocks(cuda.tile(dense[1][0], False)))


def test_dispatch_table_is_ordered_and_open_ended():
    for capability, code in itertools.product((80, 86, 89, 90, 100), CODES):
        rows = cuda._dispatch_rows(capability, code)
        assert [limit for limit, _ in rows] == sorted(limit for limit, _ in rows)
        assert cuda.choose_kernel(1e9, capability, code) == rows[-1][1]
        assert cuda.choose_kernel(0.01, capability, code) == rows[0][1]


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
    assert [flag.rsplit("=", 1)[1] for flag in flags] == ["sm_80", "sm_86", "sm_89", "sm_90", "compute_90"]
    assert build.targets(CUDA / "sm90" / "sm90_gemm.cu", build.ARCHES) == ["-gencode=arch=compute_90a,code=sm_90a"]


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
    for capability, code in itertools.product((80, 90), CODES):
        assert {kernel for _, kernel in cuda._dispatch_rows(capability, code)} <= set(cuda.kernel_names())
        assert cuda.served_capability(capability) == capability


def test_without_the_sm90_kernels_those_of_sm80_serve(cuda_library, loaded, tmp_path, caplog):
    path = tmp_path / "libpuzzlemoe_cuda.so"
    cuda_library.build.link_without_sm90(cuda_library.nvcc, cuda_library.objects, path, ["90"])
    loaded(path)
    assert cuda.kernel_names() == ("sm80_mma8", "sm80_mma16", "sm80_mma32", "sm80_mma64")
    for _ in range(2):
        assert cuda.served_capability(90) == 80 and cuda.choose_kernel(1e9, 80, "angle8") == "sm80_mma64"
    (line,) = caplog.messages
    assert "sm90_wgmma64" in line and "CUDA 13.3" in line
