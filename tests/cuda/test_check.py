"""That no register is written while a wgmma may still read it, and that a build with such code leaves it out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from puzzlemoe_vllm.backends import cuda
from puzzlemoe_vllm.format.codes import GROUP_SIZES, Decoder


def test_no_register_is_written_while_a_product_reads_it(check, cuda_library):
    """ptxas before CUDA 13.3 is known to reuse a wgmma's A registers too early in some kernels: not in these."""
    try:
        cuobjdump = check.find_cuobjdump(cuda_library.nvcc)
    except check.Unreadable as reason:
        pytest.skip(str(reason))
    kernels = check.functions(cuobjdump, cuda_library.path, "sm_90a")
    multiplying = {name: code for name, code in kernels.items() if any(i.opcode.startswith(check.WGMMA) for i in code)}
    assert set(multiplying) == {name for name in kernels if "Wgmma" in name or "fp8_gemm" in name}
    trellises = sum("TRELLIS" in decoder.name for decoder in Decoder)
    in_bf16 = 2 * (6 * len(Decoder) - trellises)  # products, tiles, decoders: sm90_wgmma48 takes no trellis words
    in_e4m3 = 2 * 2 * len(GROUP_SIZES)  # products, decoders of words with steps, step groups
    assert len(multiplying) == in_bf16 + in_e4m3
    for name, code in multiplying.items():
        assert not check.overwritten_operands(code), name


def test_no_kernel_spills_or_has_its_products_serialized(cuda_library):
    """But for a few registers of what trellis words are decoded with."""
    spills = re.findall(
        r"properties for (\S+)\n.* (\d+) bytes spill stores, (\d+) bytes spill loads", cuda_library.messages
    )
    most = [(64 if "TrellisWords" in name else 0, max(int(stores), int(loads))) for name, stores, loads in spills]
    assert len(spills) >= 64 and all(spilled <= allowed for allowed, spilled in most)
    assert not re.search(r"C75\d\d|serialized", cuda_library.messages)


def program(check, left: str, opcode: str = "HGMMA.64x64x16.F32.BF16"):
    """Two products in flight and a wait that leaves `left` of them, then a write to what the second reads."""
    product = ("R24", "R56", "gdesc[UR8]", "R24", "gsb0")
    return [
        check.Instruction(0, False, opcode, product),
        check.Instruction(16, False, opcode, ("R24", "R60", *product[2:])),
        check.Instruction(32, False, "WARPGROUP.DEPBAR.LE", ("gsb0", left)),
        check.Instruction(48, False, "LOP3.LUT", ("R63", "R1", "R2", "R3")),
        check.Instruction(64, True, "BRA", ("0x0",)),
        check.Instruction(80, False, "EXIT", ()),
    ]


@pytest.mark.parametrize("opcode", ["HGMMA.64x64x16.F32.BF16", "QGMMA.64x64x32.F32.E4M3.E4M3"])
def test_an_early_write_would_be_found(check, opcode):
    assert [found.address for found in check.overwritten_operands(program(check, "0x1", opcode))] == [48]
    assert not check.overwritten_operands(program(check, "0x0", opcode))


@pytest.mark.parametrize("opcode, width", [("IDP.4A.U8.S8", 1), ("LDSM.16.M88.4", 4), ("LDS.64", 2), ("LOP3.LUT", 1)])
def test_registers_that_an_instruction_writes(check, opcode, width):
    assert len(check.written_registers(check.Instruction(0, False, opcode, ("R8", "R4", "R5", "R6")))) == width


@pytest.fixture
def quick_build(build, cuda_library, monkeypatch):
    """`build_library`, with what was compiled before; linking and checking are real."""
    monkeypatch.setattr(build, "compile_all", lambda *_, **__: (cuda_library.objects, ""))
    return build.build_library


def built_kernels(loaded, path: Path) -> set[str]:
    loaded(path)
    return {name.split("_")[0] for name in cuda.kernel_names()}


def test_a_checked_library_has_all_kernels(quick_build, loaded, tmp_path, capfd):
    quick_build(tmp_path / "whole.so", ["90"])
    assert built_kernels(loaded, tmp_path / "whole.so") == {"sm80", "sm90"}
    assert capfd.readouterr().err == ""


def test_a_library_with_early_writes_is_linked_without_them(
    build, check, quick_build, loaded, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(check, "functions", lambda *_: {"bad": program(check, "0x1"), "good": program(check, "0x0")})
    quick_build(tmp_path / "rest.so", ["90"])
    assert built_kernels(loaded, tmp_path / "rest.so") == {"sm80"}
    (line,) = capfd.readouterr().err.splitlines()
    assert "registers too early in 1 of its kernels" in line and "CUDA 13.3 or later" in line


@pytest.mark.parametrize("release, arches", [((13, 0), {"sm80"}), ((13, 3), {"sm80", "sm90"})])
def test_code_that_nothing_can_read_is_trusted_from_13_3_on(
    build, check, quick_build, loaded, tmp_path, monkeypatch, capfd, release, arches
):
    def none(_: str) -> str:
        raise check.Unreadable("cuobjdump, which would show them, was not found")

    monkeypatch.setattr(check, "find_cuobjdump", none)
    monkeypatch.setattr(build, "nvcc_release", lambda _: release)
    quick_build(tmp_path / "library.so", ["90"])
    assert built_kernels(loaded, tmp_path / "library.so") == arches
    (line,) = capfd.readouterr().err.splitlines()
    assert "cuobjdump" in line


def test_cuobjdump_is_looked_for_beside_nvcc(check, tmp_path, monkeypatch):
    monkeypatch.setattr(
        check.shutil, "which", lambda name, path=None: f"{path}/{name}" if path == str(tmp_path) else None
    )
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda _: None)
    assert check.find_cuobjdump(str(tmp_path / "nvcc")) == str(tmp_path / "cuobjdump")
    with pytest.raises(check.Unreadable, match="was not found"):
        check.find_cuobjdump("/nowhere/nvcc")


def test_the_release_of_nvcc_is_read(build, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.86'\n")
    nvcc.chmod(0o755)
    assert build.nvcc_release(str(nvcc)) == (12, 9)
