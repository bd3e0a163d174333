"""The kernel that multiplies trellis words in integers, whole blocks of it on the host: from words as `prepare` orders
them to bf16 outputs, against float64."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from support.host_compiler import emulated_library, needs_compiler
from support.token_groups import Choices, token_groups

from puzzlemoe_vllm.backends import cuda
from puzzlemoe_vllm.format.codes import CODES, TrellisCode
from puzzlemoe_vllm.format.codes.trellis import values

SOURCE = Path(__file__).with_name("integer_kernel.cpp")

TOPK = 2

pytestmark = needs_compiler


class GroupedGemm(ctypes.Structure):
    """`GroupedGemm` of cuda/grouped.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("words", "steps", "table", "dense", "activations", "out")),
        *((name, ctypes.c_void_p) for name in ("group_counts", "groups", "sorted_slots", "partials", "arrivals")),
        ("choices", Choices),
        *((name, ctypes.c_int) for name in ("rows", "depth", "group_shift")),
        *((name, ctypes.c_bool) for name in ("skips_pairs", "skips_dense", "few")),
        ("next_words", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("next_rows", "next_depth")),
    ]


def built(folder: Path, code: TrellisCode, changes: tuple[tuple[str, str, str], ...] = ()) -> ctypes.CDLL:
    """The kernel of a code for the host; changes: of a header, what is replaced by what."""
    return emulated_library(SOURCE, folder, changes, [f"BITS={code.bits}"])


def worst_error(
    kernel: ctypes.CDLL,
    code: TrellisCode,
    gate_up: bool,
    size: tuple[int, int],
    group_size: int,
    counts: list[int],
    blocks: int,
    few: bool = False,
) -> tuple[float, int]:
    """The largest relative error of a token's outputs, with random words, steps and tokens; some tokens have columns
    far larger than others, and columns of zeros; and how many bytes of the next launch's words are fetched early.  few:
    blocks make the plan, else it is given to them."""
    (rows, depth), pairs, slots = size, len(counts) // 2, sum(counts)
    words = torch.randint(0, 256, (pairs, *code.words_shape(rows, depth)), dtype=torch.uint8)
    steps = ((torch.rand(pairs, rows, depth // group_size) + 0.5) * depth**-0.5 / 18).bfloat16()
    tokens = torch.randn((slots + TOPK - 1) // TOPK if gate_up else slots, depth)
    tokens[::2] *= 100 * torch.rand(depth).pow(8)
    tokens[::3, :16] = 0
    tokens = tokens.bfloat16()
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[torch.randperm(slots)].int()
    sorted_slots = experts.argsort(stable=True).int()
    out = torch.full((slots, rows // 2 if gate_up else rows), float("nan"), dtype=torch.bfloat16)
    groups = token_groups(counts, kernel.part_tokens(), pairs)
    plan = {
        "group_counts": torch.tensor([len(groups), len(groups)], dtype=torch.int32),
        "groups": groups,
        "sorted_slots": sorted_slots,
    }
    held = {
        "words": torch.stack(
            [cuda.blocks(cuda.kernel_words(cuda.tile(code.unpack(of), gate_up), code)) for of in words]
        ),
        "steps": torch.stack([cuda.tile_steps(of, gate_up).flatten() for of in steps]),
        "activations": tokens,
        "out": out,
        "partials": torch.full((kernel.partial_floats(),), float("nan")),
        "arrivals": torch.full((kernel.max_arrivals(),), -1),
    }
    gemm = GroupedGemm(rows=rows, depth=depth, few=few)
    gemm.choices = Choices(experts.data_ptr(), None, slots, TOPK, pairs, 0)
    gemm.group_shift = (group_size // 32).bit_length()
    gemm.next_words, gemm.next_rows, gemm.next_depth = held["words"].data_ptr(), depth, rows
    for name, tensor in (held if few else held | plan).items():
        setattr(gemm, name, tensor.data_ptr())
    kernel.multiply.restype = ctypes.c_int64
    fetched = kernel.multiply(int(gate_up), blocks, pairs, ctypes.byref(gemm))
    assert set(held["arrivals"].tolist()) <= {-1, 0}

    expected, row = torch.empty(out.shape, dtype=torch.float64), 0
    for expert, count in enumerate(counts):
        value = values(code.states(words[expert // 2]))[expert % 2].double().unflatten(-1, (-1, group_size))
        weights = (value * steps[expert // 2].double()[..., None]).flatten(-2)
        for slot in range(row, row + count):
            place = int(sorted_slots[slot])
            product = weights @ tokens[place // TOPK if gate_up else slot].double()
            if gate_up:
                gate, up = product.chunk(2)
                expected[slot] = torch.nn.functional.silu(gate) * up
            else:
                expected[place] = product
        row += count
    return ((out.double() - expected).norm(dim=1) / expected.norm(dim=1)).max().item(), fetched


TOLERANCE = 4e-3
"""The outputs are rounded to bf16, which makes up to 2e-3 of a token."""

LAUNCHES = [
    (False, (512, 128), 128, [1, 0], 1),
    (False, (512, 128), 128, [0, 1], 1),
    (True, (512, 192), 64, [3, 2], 2),
    (False, (544, 160), 32, [5, 1, 0, 6], 3),
    (True, (288, 96), 32, [3, 8], 1),
    (False, (256, 256), 128, [8, 5], 2),
    (False, (1024, 512), 128, [9, 20, 1, 0], 3),
    (True, (96, 32), 32, [16, 1], 2),
    (True, (512, 1024), 128, [6, 3], 5),
]
"""Rows and columns that fill no tile, every number of tiles of four tokens, items cut between blocks."""


@pytest.mark.parametrize("code", [c for c in CODES.values() if isinstance(c, TrellisCode)], ids=lambda c: c.name)
def test_products_in_integers_are_those_of_the_format(code, tmp_path):
    kernel = built(tmp_path, code)
    early = 0
    for number, launch in enumerate(LAUNCHES):
        error, fetched = worst_error(kernel, code, *launch, few=number % 2 == 0)
        assert error < TOLERANCE, launch
        early += fetched
    assert early > 0


@pytest.mark.parametrize(
    "header, right, wrong",
    [
        ("sm90/tokens_int8.cuh", "excess = 62 * scale", "excess = 61 * scale"),
        ("sm90/tokens_int8.cuh", "store_shared_8(to ^ 64,", "store_shared_8(to,"),
        ("sm90/mainloop_imma.cuh", "second(1)", "second(0)"),
        ("sm90/epilogue.cuh", "column % 8 / 2 + column % 2 * 4", "column % 8"),
    ],
)
def test_a_wrong_kernel_is_seen(header, right, wrong, tmp_path):
    code = CODES["trellis4"]
    broken = built(tmp_path, code, ((header, right, wrong),))
    error, _ = worst_error(broken, code, False, (256, 128), 128, [7, 3], 1)
    assert not error < TOLERANCE
