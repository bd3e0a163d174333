"""The kernel that multiplies trellis words in integers, whole blocks of it on the host: from words as `prepare` orders
them to bf16 outputs, against float64."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from support.host_compiler import emulated_library, needs_compiler
from support.token_groups import Choices, token_groups
from torch import Tensor

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
        *((name, ctypes.c_bool) for name in ("skips_pairs", "skips_dense")),
    ]


def built(folder: Path, code: TrellisCode, changes: tuple[tuple[str, str, str], ...] = ()) -> ctypes.CDLL:
    """The kernels of a code for the host; changes: of a header, what is replaced by what."""
    return emulated_library(SOURCE, folder, changes, [f"BITS={code.bits}"])


class Product:
    """Random words and steps [rows, depth] of pairs, and where the outputs of slots go."""

    def __init__(
        self, code: TrellisCode, gate_up: bool, pairs: int, rows: int, depth: int, group_size: int, slots: int
    ):
        self.code, self.gate_up, self.group_size = code, gate_up, group_size
        self.words = torch.randint(0, 256, (pairs, *code.words_shape(rows, depth)), dtype=torch.uint8)
        self.steps = ((torch.rand(pairs, rows, depth // group_size) + 0.5) * depth**-0.5 / 18).bfloat16()
        tiled = (cuda.kernel_words(cuda.tile(code.unpack(of), gate_up), code) for of in self.words)
        self.held = {
            "words": torch.stack([cuda.blocks(of) for of in tiled]),
            "steps": torch.stack([cuda.tile_steps(of, gate_up).flatten() for of in self.steps]),
            "out": torch.full((slots, rows // 2 if gate_up else rows), float("nan"), dtype=torch.bfloat16),
        }
        self.gemm = GroupedGemm(rows=rows, depth=depth, group_shift=(group_size // 32).bit_length())
        self.give(self.held)

    @property
    def out(self) -> Tensor:
        return self.held["out"]

    def give(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self.gemm, name, tensor.data_ptr())

    def expert(self, expert: int, row: Tensor) -> Tensor:
        """What an expert makes of bf16 [depth], in float64."""
        value = values(self.code.states(self.words[expert // 2]))[expert % 2].double()
        steps = self.steps[expert // 2].double()[..., None]
        product = (value.unflatten(-1, (-1, self.group_size)) * steps).flatten(-2) @ row.double()
        if not self.gate_up:
            return product
        gate, up = product.chunk(2)
        return torch.nn.functional.silu(gate) * up


def worst_errors(
    kernel: ctypes.CDLL,
    code: TrellisCode,
    size: tuple[int, int],
    group_size: int,
    counts: list[int],
    blocks: int,
) -> tuple[float, float]:
    """Of gate and up, and of the down projection, the largest relative error of a token's outputs; some tokens have
    columns far larger than others, and columns of zeros.  size: hidden and intermediate; counts: tokens of each
    expert."""
    (hidden, intermediate), pairs, slots = size, len(counts) // 2, sum(counts)
    tokens = torch.randn((slots + TOPK - 1) // TOPK, hidden)
    tokens[::2] *= 100 * torch.rand(hidden).pow(8)
    tokens[::3, :16] = 0
    tokens = tokens.bfloat16()
    gate_up = Product(code, True, pairs, 2 * intermediate, hidden, group_size, slots)
    down = Product(code, False, pairs, hidden, intermediate, group_size, slots)
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[torch.randperm(slots)].int()
    sorted_slots = experts.argsort(stable=True).int()
    groups = token_groups(counts, kernel.part_tokens(), pairs)
    plan = {"group_counts": torch.tensor([len(groups)] * 2, dtype=torch.int32), "groups": groups}
    plan["sorted_slots"] = sorted_slots
    partials = torch.full((kernel.partial_floats(),), float("nan"))
    arrivals = torch.full((kernel.max_arrivals(),), -1)
    for product, activations in ((gate_up, tokens), (down, gate_up.out)):
        product.gemm.choices = Choices(experts.data_ptr(), None, slots, TOPK, pairs, 0)
        product.give({"partials": partials, "arrivals": arrivals, "activations": activations} | plan)
        kernel.multiply(blocks, product.gate_up, ctypes.byref(product.gemm))
    assert set(arrivals.tolist()) <= {-1, 0}

    worst = [0.0, 0.0]
    for row, place in enumerate(sorted_slots.tolist()):
        expert = int(experts[place])
        made = (
            (gate_up.out[row], gate_up.expert(expert, tokens[place // TOPK])),
            (down.out[place], down.expert(expert, gate_up.out[row])),
        )
        for which, (own, expected) in enumerate(made):
            worst[which] = max(worst[which], ((own.double() - expected).norm() / expected.norm()).nan_to_num(9).item())
    return worst[0], worst[1]


TOLERANCE = 4e-3
"""The outputs are rounded to bf16, which makes up to 2e-3 of a token."""

LAYERS = [
    ((128, 256), 128, [1, 0], 1),
    ((512, 128), 128, [0, 1], 1),
    ((192, 256), 64, [3, 2], 2),
    ((544, 160), 32, [5, 1, 0, 6], 3),
    ((96, 160), 32, [3, 8], 1),
    ((256, 256), 128, [8, 5], 2),
    ((512, 512), 128, [9, 20, 1, 0], 3),
    ((32, 64), 32, [16, 1], 2),
    ((1024, 256), 128, [6, 3], 5),
]
"""Hidden and intermediate sizes that fill no tile, every number of tiles of four tokens, items cut between blocks."""


@pytest.mark.parametrize("code", [c for c in CODES.values() if isinstance(c, TrellisCode)], ids=lambda c: c.name)
def test_products_in_integers_are_those_of_the_format(code, tmp_path):
    kernel = built(tmp_path, code)
    for layer in LAYERS:
        assert max(worst_errors(kernel, code, *layer)) < TOLERANCE, layer


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
    assert not max(worst_errors(broken, code, (256, 128), 128, [7, 3], 2)) < TOLERANCE
