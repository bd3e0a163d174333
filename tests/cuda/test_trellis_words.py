"""How the CUDA kernels decode trellis words, on the host: every state, in the order that `prepare` writes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from support.host_compiler import COMPILER, emulated_sources, needs_compiler
from torch import Tensor

from puzzlemoe_vllm.backends import cuda
from puzzlemoe_vllm.format.codes import CODES, TrellisCode
from puzzlemoe_vllm.format.codes.trellis import values

SOURCE = Path(__file__).with_name("trellis_words.cpp")

pytestmark = needs_compiler

TRELLISES = [code for code in CODES.values() if isinstance(code, TrellisCode)]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trellis")
    command = [COMPILER, "-std=c++17", "-O1", "-fno-strict-aliasing", "-w"]
    command += [f"-I{emulated_sources(folder)}", f"-I{SOURCE.parent}", str(SOURCE), "-o", str(folder / "decode")]
    subprocess.run(command, check=True, timeout=300)
    return folder / "decode"


def halves(registers: Tensor) -> tuple[Tensor, Tensor]:
    """float32 of the lower and the upper bf16 of int32 registers."""
    return (registers << 16).view(torch.float32), (registers & -0x10000).view(torch.float32)


@pytest.mark.parametrize("gate_up", [False, True])
@pytest.mark.parametrize("code", TRELLISES, ids=lambda code: code.name)
def test_lanes_decode_as_the_format_says(program, code, gate_up):
    rows, columns = 256, 2048
    words = torch.randint(0, 256, code.words_shape(rows, columns), dtype=torch.uint8)
    states = code.states(words)
    assert len(states.unique()) > 0.999 * 2**code.state_bits
    tiles = cuda.kernel_words(cuda.tile(code.unpack(words), gate_up), code)
    done = subprocess.run(
        [program, str(code.bits), str(rows // 16 * columns // 16)],
        input=tiles.numpy().tobytes(), capture_output=True, check=True, timeout=300,
    )  # fmt: skip
    # [tile, lane, part, register]
    registers = torch.frombuffer(bytearray(done.stdout), dtype=torch.int32).view(-1, 32, 4, 4)
    elements = torch.stack(halves(registers), dim=-1).flatten(-2)  # [tile, lane, part, element]
    # [position, tile, lane, element]
    expected = torch.stack([cuda.tile(of, gate_up).view(-1, 32, 8) for of in values(states)])
    for part, position in enumerate((0, 1, 0, 1)):
        assert torch.equal(elements[:, :, part], expected[position])
