"""The kernels of compute capability 9.0, whole blocks of them on the host: from words as `prepare` orders them to bf16
outputs, against float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.host_compiler import emulated_library, needs_compiler
from support.token_groups import token_groups
from torch import Tensor

from puzzlemoe_vllm.backends import cuda
from puzzlemoe_vllm.backends.cuda_self_check import random_words
from puzzlemoe_vllm.format.codes import CODES, PairCode, TrellisCode
from puzzlemoe_vllm.format.codes.trellis import values

SOURCE = Path(__file__).with_name("sm90_kernel.cpp")

TOPK = 2
TRELLISES = [code for code in CODES.values() if isinstance(code, TrellisCode)]
OTHERS = [code for code in CODES.values() if not isinstance(code, TrellisCode)]

pytestmark = needs_compiler


class GroupedGemm(ctypes.Structure):
    """`GroupedGemm` of cuda/grouped.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("words", "steps", "table", "dense", "activations", "out")),
        *((name, ctypes.c_void_p) for name in ("group_counts", "groups", "sorted_slots", "partials", "arrivals")),
        *((name, ctypes.c_int) for name in ("topk", "pairs", "rows", "depth", "group_shift")),
        *((name, ctypes.c_bool) for name in ("skips_pairs", "skips_dense")),
    ]


@dataclass(frozen=True)
class Kernel:
    """The kernels of a tile of cuda/sm90 and a code, for the host."""

    library: ctypes.CDLL
    tile: str
    code: PairCode


def built(folder: Path, tile: str, code: PairCode, changes: tuple[tuple[str, str, str], ...] = ()) -> Kernel:
    """changes: of a header, what is replaced by what."""
    if isinstance(code, TrellisCode):
        name = f"TrellisWords<{code.bits}>"
    else:
        name = f"TableWords<{code.bits},{tile}::kTableStride>" if code.has_steps else code.name.title()
    gemm = "WarpGemm<CODE,kGateUp>" if tile == "WarpTile" else "Sm90Gemm<CODE,TILE,kGateUp>"
    macros = [f"TILE={tile}", f"CODE={name}", f"GEMM={gemm}"]
    return Kernel(emulated_library(SOURCE, folder, changes, macros), tile, code)


class Product:
    """Random words and steps [rows, depth] of pairs, and where the outputs of slots go."""

    def __init__(self, kernel: Kernel, gate_up: bool, pairs: int, rows: int, depth: int, group_size: int, slots: int):
        self.kernel, self.gate_up, self.group_size = kernel, gate_up, group_size
        code = kernel.code
        self.words = random_words(code, pairs, rows, depth, torch.default_generator)
        tiled = (cuda.kernel_words(cuda.tile(code.unpack(of), gate_up), code) for of in self.words)
        self.held = {
            "words": torch.stack([cuda.blocks(of) for of in tiled]),
            "out": torch.full((slots, rows // 2 if gate_up else rows), float("nan"), dtype=torch.bfloat16),
        }
        self.gemm = GroupedGemm(topk=TOPK, pairs=pairs, rows=rows, depth=depth)
        self.steps = None
        if code.has_steps:
            self.steps = ((torch.rand(pairs, rows, depth // group_size) + 0.5) * depth**-0.5 / 18).bfloat16()
            self.held["steps"] = torch.stack([cuda.tile_steps(of, gate_up).flatten() for of in self.steps])
            self.gemm.group_shift = (group_size // 32).bit_length()
        if (table := code.word_table(torch.device("cpu"))) is not None:
            self.held["table"] = table
        self.give(self.held)

    @property
    def out(self) -> Tensor:
        return self.held["out"]

    def give(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self.gemm, name, tensor.data_ptr())

    def weights(self, pair: int, position: int) -> Tensor:
        """float64 [rows, depth], rounded to bf16 but where the kernel multiplies sums by the steps."""
        steps, code, words = None if self.steps is None else self.steps[pair], self.kernel.code, self.words[pair]
        if steps is None or self.kernel.tile not in ("Imma8", "WarpTile"):
            return code.decode(words, position, steps).double()
        if isinstance(code, TrellisCode):
            value = values(code.states(words))[position]
        else:
            value = code.decode(words, position, torch.ones_like(steps))
        return (value.double().unflatten(-1, (-1, self.group_size)) * steps.double()[..., None]).flatten(-2)

    def expert(self, expert: int, row: Tensor) -> Tensor:
        """What an expert makes of bf16 [depth], in float64."""
        product = self.weights(expert // 2, expert % 2) @ row.double()
        if not self.gate_up:
            return product
        gate, up = product.chunk(2)
        return torch.nn.functional.silu(gate) * up


def worst_errors(
    kernel: Kernel, size: tuple[int, int], group_size: int, counts: list[int], blocks: int
) -> tuple[float, float]:
    """Of gate and up, and of the down projection, the largest relative error of a token's outputs; some tokens have
    columns far larger than others, and columns of zeros.  size: hidden and intermediate; counts: tokens of each
    expert."""
    (hidden, intermediate), pairs, slots = size, len(counts) // 2, sum(counts)
    tokens = torch.randn((slots + TOPK - 1) // TOPK, hidden)
    tokens[::2] *= 100 * torch.rand(hidden).pow(8)
    tokens[::3, :16] = 0
    tokens = tokens.bfloat16()
    gate_up = Product(kernel, True, pairs, 2 * intermediate, hidden, group_size, slots)
    down = Product(kernel, False, pairs, hidden, intermediate, group_size, slots)
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[torch.randperm(slots)].int()
    sorted_slots = experts.argsort(stable=True).int()
    groups = token_groups(counts, kernel.library.part_tokens(), pairs)
    plan = {"group_counts": torch.tensor([len(groups)] * 2, dtype=torch.int32), "groups": groups}
    plan["sorted_slots"] = sorted_slots
    partials = torch.full((kernel.library.partial_floats(),), float("nan"))
    arrivals = torch.full((kernel.library.max_arrivals(),), -1)
    for product, activations in ((gate_up, tokens), (down, gate_up.out)):
        product.give({"partials": partials, "arrivals": arrivals, "activations": activations} | plan)
        kernel.library.multiply(blocks, product.gate_up, ctypes.byref(product.gemm))
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
"""The outputs are rounded to bf16, which is half a step of 2^-7 at most."""

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


def layers_around(tokens: int) -> list[tuple[tuple[int, int], int, list[int], int]]:
    """Layers with a token more and less than one or more parts of so many tokens, stages that are not whole, and items
    cut between blocks."""
    return [
        ((256, 128), 128, [tokens, 1], 2),
        ((96, 160), 32, [1, tokens - 1], 3),
        ((192, 64), 64, [tokens + 1, 0, 2, tokens // 2 + 1], 1),
        ((512, 128), 128, [2 * tokens + 3, tokens], 3),
    ]


@pytest.mark.parametrize("code", CODES.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("tile", ["Wgmma16", "Wgmma32", "Wgmma48", "Wgmma64", "Wgmma80", "Wgmma128"])
def test_products_are_those_of_the_format(tile, code, tmp_path):
    kernel = built(tmp_path, tile, code)
    for layer in layers_around(kernel.library.part_tokens()):
        assert max(worst_errors(kernel, *layer)) < TOLERANCE, layer


@pytest.mark.parametrize("code", TRELLISES, ids=lambda c: c.name)
def test_products_in_integers_are_those_of_the_format(code, tmp_path):
    kernel = built(tmp_path, "Imma8", code)
    for layer in LAYERS:
        assert max(worst_errors(kernel, *layer)) < TOLERANCE, layer


@pytest.mark.parametrize("code", OTHERS, ids=lambda c: c.name)
def test_products_of_warps_on_their_own_are_those_of_the_format(code, tmp_path):
    kernel = built(tmp_path, "WarpTile", code)
    for layer in (*layers_around(kernel.library.part_tokens()), ((1152, 1088), 64, [1, 9], 5)):
        assert max(worst_errors(kernel, *layer)) < TOLERANCE, layer


@pytest.mark.parametrize(
    "tile, code, header, right, wrong",
    [
        ("Imma8", "trellis4", "sm90/tokens_int8.cuh", "excess = 62 * scale", "excess = 61 * scale"),
        ("Imma8", "trellis4", "sm90/tokens_int8.cuh", "store_shared_8(to ^ 64,", "store_shared_8(to,"),
        ("Imma8", "trellis4", "sm90/mainloop_imma.cuh", "second(1)", "second(0)"),
        ("Imma8", "trellis4", "sm90/epilogue.cuh", "column % 8 / 2 + column % 2 * 4", "column % 8"),
        ("Wgmma80", "angle8", "sm90/stages.cuh", "(column ^ first) * 16", "column * 16"),
        ("Wgmma80", "angle8", "sm90/mainloop_wgmma.cuh", "tokens + Tile::kPartTokens * 8", "tokens"),
        ("Wgmma80", "angle8", "sm90/epilogue.cuh", "lane / 8 % 2 * 16", "lane / 8 % 2 * 8"),
        ("Wgmma16", "angle8", "sm90/sums.cuh", "sum[2] += other.z", "sum[2] += other.w"),
        ("WarpTile", "angle8", "sm90/warp_gemm.cuh", "columns[tile * 8 + 4]", "columns[tile * 8 + 2]"),
        ("WarpTile", "angle8", "sm90/warp_gemm.cuh", "threadIdx.x % 32 / 4 * 4", "threadIdx.x % 8 * 4"),
        ("WarpTile", "mask16", "sm90/warp_gemm.cuh", "from - (from > warp)", "max(from - 1, 0)"),
    ],
)
def test_a_wrong_kernel_is_seen(tile, code, header, right, wrong, tmp_path):
    broken = built(tmp_path, tile, CODES[code], ((header, right, wrong),))
    assert not max(worst_errors(broken, (512, 128), 128, [7, 3], 2)) < TOLERANCE
