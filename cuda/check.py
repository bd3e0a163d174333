"""Reads nvdisasm-style machine code, to check what no PTX promises: ptxas chooses the registers."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    address: int
    predicated: bool
    opcode: str
    operands: tuple[str, ...]


WGMMA = ("HGMMA", "QGMMA")
"""How machine code names wgmma, in bf16 and in e4m3."""


class Unreadable(RuntimeError):
    """Why a library's machine code cannot be read."""


def find_cuobjdump(nvcc: str | None = None) -> str:
    """cuobjdump beside an nvcc, on the PATH, of the CUDA toolkit, or the one that Triton brings.  Raises Unreadable."""
    places = [str(Path(nvcc).resolve().parent)] if nvcc else []
    for place in (*places, None, "/usr/local/cuda/bin"):
        if found := shutil.which("cuobjdump", path=place):
            return found
    triton = importlib.util.find_spec("triton")
    for package in (triton.submodule_search_locations or []) if triton else []:
        bundled = Path(package, "backends/nvidia/bin/cuobjdump")
        if bundled.is_file():
            return str(bundled)
    raise Unreadable("cuobjdump, which would show them, was not found")


def functions(cuobjdump: str, library: Path, arch: str) -> dict[str, list[Instruction]]:
    """Instructions of every kernel that a library has for `arch`, such as sm_90a, by its mangled name.  Raises
    Unreadable."""
    env = {"PATH": f"{Path(cuobjdump).parent}:/usr/bin:/bin"}
    done = subprocess.run([cuobjdump, "-sass", "-arch", arch, str(library)], capture_output=True, text=True, env=env)
    if done.returncode:
        raise Unreadable(f"{cuobjdump} failed: {done.stderr.strip()}")
    text = done.stdout
    kernels: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            code = kernels[name[1]] = []
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([^;]*);", line):
            opcode, _, operands = found[3].strip().partition(" ")
            split = tuple(operand.strip() for operand in operands.split(",")) if operands else ()
            code.append(Instruction(int(found[1], 16), found[2] is not None, opcode, split))
    return kernels


def written_registers(instruction: Instruction) -> range:
    """General registers that an instruction writes, from its first operand and its width."""
    opcode = instruction.opcode
    no_result = ("ST", "BRA", "BAR", "RED", "EXIT", "SYNCS", "WARPGROUP", *WGMMA, "NOP", "CS2UR", "R2UR", "UTMA")
    if not instruction.operands or opcode.startswith(no_result):
        return range(0)
    target = next((operand for operand in instruction.operands if not re.match(r"U?PT?\d?$", operand)), "")
    register = re.match(r"R(\d+)", target)
    if not register:
        return range(0)
    width = 4 if ".128" in opcode or ".x4" in opcode or opcode.endswith(".4") or opcode.startswith("HMMA") else 1
    width = max(width, 2 if ".64" in opcode or "WIDE" in opcode or opcode == "CS2R" else 1)
    return range(int(register[1]), int(register[1]) + width)


Flying = tuple[tuple[int, ...], ...]
"""First registers of the A operands of the products in flight, by group; the last group is still open."""


def overwritten_operands(code: list[Instruction]) -> list[Instruction]:
    """Instructions that write a register which a wgmma still in flight may read as its A operand.

    Follows every path with the products in flight, in the groups that `gsb0` closes: a WARPGROUP.DEPBAR leaves only
    as many closed groups in flight as it says.  Raises Unreadable where a wgmma is unlike ours.
    """
    index = {instruction.address: place for place, instruction in enumerate(code)}
    found: dict[int, Instruction] = {}
    seen: set[tuple[int, Flying]] = set()
    pending: list[tuple[int, Flying]] = [(0, ((),))]
    while pending:
        place, flying = pending.pop()
        while place < len(code) and (place, flying) not in seen:
            seen.add((place, flying))
            instruction = code[place]
            written = written_registers(instruction)
            if any(first < written.stop and written.start < first + 4 for group in flying for first in group):
                found[instruction.address] = instruction
            if instruction.opcode.startswith(WGMMA):
                operand = re.match(r"R(\d+)", instruction.operands[1])
                if not operand:
                    raise Unreadable(f"{instruction} has no A operand in registers")
                flying = (*flying[:-1], (*flying[-1], int(operand[1])))
                flying += ((),) if instruction.operands[-1] == "gsb0" else ()
            elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
                left = int(instruction.operands[1], 16)
                flying = flying[-1 - left :]
            elif instruction.opcode.startswith("BRA") and (
                target := re.search(r"0x([0-9a-f]+)", instruction.operands[-1])
            ):
                pending.append((index[int(target[1], 16)], flying))
                if not instruction.predicated and len(instruction.operands) == 1:
                    break
            elif instruction.opcode == "EXIT" and not instruction.predicated:
                break
            place += 1
    return list(found.values())


def early_writes(cuobjdump: str, library: Path) -> dict[str, list[Instruction]]:
    """What `overwritten_operands` finds in a library, by kernel; empty when all is well.

    Raises Unreadable, also where the library has no wgmma at all: then it was not these kernels that were read.
    """
    kernels = {
        name: code
        for name, code in functions(cuobjdump, library, "sm_90a").items()
        if any(instruction.opcode.startswith(WGMMA) for instruction in code)
    }
    if not kernels:
        raise Unreadable(f"{cuobjdump} shows no wgmma in the library")
    found = {name: overwritten_operands(code) for name, code in kernels.items()}
    return {name: early for name, early in found.items() if early}
