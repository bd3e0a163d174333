"""How the CUDA library sorts slots by expert and sums experts' outputs: its kernels, compiled for the host."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from support.host_compiler import COMPILER, needs_compiler

SOURCE = Path(__file__).with_name("routing.cpp")
CUDA = Path(__file__).parents[2] / "cuda"
GROUPED = '#include "grouped.cuh"\n'

pytestmark = needs_compiler


def part(text: str, pattern: str) -> str:
    """The one place of a source that a pattern finds."""
    (found,) = re.findall(pattern, text, re.DOTALL | re.MULTILINE)
    return found


def on_the_host(kernels: str) -> str:
    """routing.cu with what it includes, in C++."""
    header, grouped, sums = ((CUDA / name).read_text() for name in ("routing.cuh", "grouped.cuh", "block_sums.cuh"))
    needed = part(grouped, r"^struct TokenGroup \{.*?^\};")
    assert header.count(GROUPED) == 1
    kernels = re.sub(r'#include ".*?"\n', "", sums + kernels)
    kernels = re.sub(r"(\w+)<<<(.*?)>>>\(", r"launch_early(\1, \2, ", kernels)
    return (header.replace(GROUPED, needed + "\n") + kernels).replace("#pragma once", "")


def checked(kernels: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "routing_on_the_host.cuh").write_text(on_the_host(kernels))
    program = folder / "routing"
    command = [COMPILER, "-std=c++17", "-O1", "-fno-strict-aliasing", "-w", f"-I{folder}", str(SOURCE)]
    subprocess.run([*command, "-o", str(program)], check=True, timeout=300)
    return subprocess.run([program], capture_output=True, text=True, timeout=300)


def test_every_slot_of_every_size_has_its_row(tmp_path):
    done = checked((CUDA / "routing.cu").read_text(), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > 50


@pytest.mark.parametrize(
    "right, wrong, promise",
    [
        ("rows.groups() : 0", "(rows.groups() + 1) / 2 : 0", "every slot with an expert here has one row"),
        ("    __syncwarp();\n    if (experts[i] >= 0 && before", "    if (experts[i] >= 0 && before", "rows are"),
        ("uint32_t(routing.local_expert(first + k) >= 0) << k", "1u << k", "sum of its experts"),
    ],
)
def test_a_mistake_in_it_would_be_found(right, wrong, promise, tmp_path):
    kernels = (CUDA / "routing.cu").read_text()
    assert kernels.count(right) == 1
    done = checked(kernels.replace(right, wrong), tmp_path)
    assert done.returncode == 1 and promise in done.stdout
