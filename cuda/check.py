"""Reads nvdisasm-style machine code, to check what no PTX promises: ptxas chooses the registers."""

from __future__ import annotations

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


def find_cuobjdump() -> str | None:
    """cuobjdump of the CUDA toolkit, or the one that Triton brings."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.is_file() else None


def functions(cuobjdump: str, library: Path) -> dict[str, list[Instruction]]:
    """Instructions of every kernel of a library by its mangled name."""
    env = {"PATH": f"{Path(cuobjdump).parent}:/usr/bin:/bin"}
    text = subprocess.run(
        [cuobjdump, "-sass", str(library)], capture_output=True, text=True, check=True, env=env
    ).stdout
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
    no_result = ("ST", "BRA", "BAR", "RED", "EXIT", "SYNCS", "WARPGROUP", "HGMMA", "NOP", "CS2UR", "R2UR", "UTMA")
    if not instruction.operands or opcode.startswith(no_result):
        return range(0)
    target = next((operand for operand in instruction.operands if not re.match(r"U?PT?\d?$", operand)), "")
    register = re.match(r"R(\d+)", target)
    if not register:
        return range(0)
    width = 4 if ".128" in opcode or ".x4" in opcode or ".4" in opcode or opcode.startswith("HMMA") else 1
    width = max(width, 2 if ".64" in opcode or "WIDE" in opcode or opcode == "CS2R" else 1)
    return range(int(register[1]), int(register[1]) + width)


Flying = tuple[tuple[int, ...], ...]
"""First registers of the A operands of the products in flight, by group; the last group is still open."""


def overwritten_operands(code: list[Instruction]) -> list[Instruction]:
    """Instructions that write a register which a wgmma still in flight may read as its A operand.

    Follows every path with the products in flight, in the groups that `gsb0` closes: a WARPGROUP.DEPBAR leaves only
    as many closed groups in flight as it says.
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
            if instruction.opcode.startswith("HGMMA"):
                operand = re.match(r"R(\d+)", instruction.operands[1])
                assert operand, f"{instruction} reads its A operand from shared memory"
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
