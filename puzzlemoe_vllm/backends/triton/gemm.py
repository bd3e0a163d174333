"""The products of a layer: gate and up, down, and the sum over top-k.

Where experts have few tokens a block serves both experts of a pair with one load of its words.  When they have many the
words come from cache anyway, and a block belongs to one expert.

The tokens are the left operand of every product.  On Hopper this side decides the instruction: below 64 rows it is
mma.sync with decoded weights in registers, from 64 on wgmma with decoded weights in shared memory.  Weights on the left
would become wgmma operands in registers, which ptxas before CUDA 13.3 may reuse while the product still reads them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from puzzlemoe_vllm.backends import ExpertWeights
from puzzlemoe_vllm.backends.triton.decode import MASK16, OPERAND, PTX, decode, load_words
from puzzlemoe_vllm.backends.triton.route import load_block, route
from puzzlemoe_vllm.format.codes import get_code

VALUES_PER_PROGRAM = 512


class Tiles(NamedTuple):
    """How the two projections are cut: `tokens` per block, `rows` of weights, `depth` along K; `shared` when a block
    serves both experts of a pair; `group` blocks that walk the weights together; `registers` a thread may have."""

    tokens: int
    rows: int
    depth: int
    shared: bool
    group: int
    warps: int
    stages: int
    registers: int | None = None


class Storage(NamedTuple):
    """What a layer's experts are stored as: the number of the words' decoder, the bits of a word and the columns that
    share a step, None without steps; whether there are pairs, and dense experts."""

    decoder: int
    bits: int
    group_size: int | None
    pairs: bool
    dense: bool


class Projection(NamedTuple):
    """Pointers to one projection of all experts: words and steps of the pairs, the latter None without, and matrices of
    the dense experts."""

    words: Any
    steps: Any
    dense: Any


class Matrix(NamedTuple):
    """Pointers to a stored matrix, or a pair of them: words, steps and table; or weights, then all else None."""

    words: Any
    steps: Any
    table: Any


class Tokens(NamedTuple):
    """Where the values of a block's tokens begin, and which of its rows there are: those of its expert or its pair's
    leader, and those of the partner."""

    leader: Any
    keep_leader: Any
    partner: Any
    keep_partner: Any


def choose_tiles(slots: int, experts: int) -> Tiles:
    """Tiles for that many slots spread over that many experts.

    All fit in 99 KiB of shared memory.  The registers of the largest are capped so that a Hopper multiprocessor holds
    two programs: one decodes while the other multiplies.
    """
    load = slots / experts
    if load <= 8:
        return Tiles(16, 64, 128, shared=True, group=1, warps=4, stages=4)
    if load <= 32:
        return Tiles(32, 64, 64, shared=True, group=4, warps=4, stages=4)
    return Tiles(128, 128, 64, shared=False, group=16, warps=8, stages=3, registers=128)


def choose_split(programs: int, columns: int, depth: int) -> int:
    """Parts of K in the down projection: enough programs to keep a large GPU's memory busy, four steps each or more."""
    split = 1
    while programs * split < 512 and columns >= 8 * depth * split:
        split *= 2
    return split


def layer(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, weights: ExpertWeights, out: Tensor) -> None:
    """Writes `fused_experts` of contiguous x [M, H] to `out`."""
    hidden_size = x.shape[1]
    intermediate = weights.w2_dense.shape[-1]
    top_k, slots = topk_ids.shape[1], topk_ids.numel()
    experts, pairs = weights.total, weights.merged // 2
    tiles = choose_tiles(slots, experts if weights.expert_map is None else weights.expert_map.shape[0])
    blocks, most, slot_expert = route(topk_ids, weights.expert_map, experts, pairs if tiles.shared else 0, tiles.tokens)
    code, steps = get_code(weights.code), weights.w13_steps
    group_size = None if steps is None else hidden_size // steps.shape[2]
    constants = dict(
        word_table=code.word_table(x.device),
        STORAGE=Storage(int(code.decoder), code.bits, group_size, pairs > 0, experts > 2 * pairs),
        TILES=tiles, num_warps=tiles.warps, num_stages=tiles.stages,
        **({"maxnreg": tiles.registers} if PTX.value else {}),
    )  # fmt: skip
    hidden = torch.empty(slots, intermediate, dtype=torch.bfloat16, device=x.device)
    gate_up_programs = most * triton.cdiv(2 * intermediate, tiles.rows)
    gate_up_kernel[(gate_up_programs,)](
        x, hidden, Projection(weights.w13_pairs, weights.w13_steps, weights.w13_dense), blocks, most, top_k, pairs,
        hidden_size, intermediate, **constants,
    )  # fmt: skip

    down_programs = most * triton.cdiv(hidden_size, tiles.rows)
    split = choose_split(down_programs, intermediate, tiles.depth)
    # Parts are summed before any rounding; whole rows are rounded as a bf16 matrix product rounds them.
    dtype = torch.bfloat16 if split == 1 else torch.float32
    down = torch.empty(split, slots, hidden_size, dtype=dtype, device=x.device)
    down_kernel[(down_programs, split)](
        hidden, down, Projection(weights.w2_pairs, weights.w2_steps, weights.w2_dense), blocks, most, slots, pairs,
        hidden_size, intermediate, **constants,
    )  # fmt: skip
    combine_kernel[(triton.cdiv(out.numel(), VALUES_PER_PROGRAM),)](
        down, topk_weights, slot_expert, out, slots, out.numel(), hidden_size,
        TOP_K=top_k, SPLIT=split, BLOCK=VALUES_PER_PROGRAM,
    )  # fmt: skip


@triton.jit
def _place(blocks, row_tiles, GROUP: tl.constexpr):
    """(token block, row tile) of this program: GROUP blocks walk the row tiles together."""
    program = tl.program_id(0)
    first = program // (GROUP * row_tiles) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    within = program % (GROUP * row_tiles)
    return first + within % size, within // size


@triton.jit
def _multiply(
    leader, partner, matrix, rows, tokens, start, stop, K,
    STORAGE: tl.constexpr, LEADER: tl.constexpr, PARTNER: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Adds the products of the leader's and the partner's tokens with some rows of a matrix over K in [start, stop).

    LEADER, PARTNER: the position of the words to decode for either; None takes the weights as they are and, for the
    partner, makes no product.
    """
    for k in range(start, stop, DEPTH):
        column = k + tl.arange(0, DEPTH)[None, :]
        steps = None
        if LEADER is None:
            tile = tl.load(matrix.words + rows[:, None] * K + column, mask=column < stop, other=0)
        else:
            tile = load_words(matrix.words, rows[:, None], column, stop, K, STORAGE.decoder, STORAGE.bits)
            if STORAGE.group_size is not None:
                group = matrix.steps + rows[:, None] * (K // STORAGE.group_size) + column // STORAGE.group_size
                steps = tl.load(group, mask=column < stop, other=0)
        x = tl.load(tokens.leader[:, None] + column, mask=tokens.keep_leader[:, None] & (column < stop), other=0)
        weight = decode(tile, LEADER, steps, matrix.table, STORAGE.decoder)
        leader = tl.dot(x.to(OPERAND), weight.to(OPERAND).T, leader)
        if PARTNER is not None:
            x = tl.load(tokens.partner[:, None] + column, mask=tokens.keep_partner[:, None] & (column < stop), other=0)
            weight = decode(tile, PARTNER, steps, matrix.table, STORAGE.decoder)
            partner = tl.dot(x.to(OPERAND), weight.to(OPERAND).T, partner)
    return leader, partner


@triton.jit
def _project(
    projection, word_table, expert, pairs, N, K, rows, tokens, start, stop, STORAGE: tl.constexpr, TILES: tl.constexpr
):
    """float32 products [tokens, rows] of an expert's tokens with some rows of its matrix [N, K] and, in a shared block,
    of its partner's tokens with the partner's matrix.

    There is a loop for every way the matrix may be stored, and all but one make no steps: with branches instead, Triton
    would reserve shared memory for each.
    """
    BLOCK_M: tl.constexpr = TILES.tokens  # Triton 3.6 takes no field of a constant in a tuple
    BLOCK_N: tl.constexpr = TILES.rows
    leader = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    partner = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    size = N.to(tl.int64) * K
    if STORAGE.pairs:
        pair = tl.minimum(expert >> 1, pairs - 1)
        words = projection.words + pair * (size if STORAGE.bits == 16 else size // 8 * STORAGE.bits)
        steps = projection.steps
        if STORAGE.group_size is not None:
            steps += pair * (size // STORAGE.group_size)
        matrix = Matrix(words, steps, word_table)
        pair_stop = tl.where(expert < 2 * pairs, stop, start)
        if TILES.shared:
            leader, partner = _multiply(
                leader, partner, matrix, rows, tokens, start, pair_stop, K, STORAGE, 0, 1, TILES.depth
            )
        else:
            first_stop = tl.where(expert & 1 == 0, pair_stop, start)
            leader, partner = _multiply(
                leader, partner, matrix, rows, tokens, start, first_stop, K, STORAGE, 0, None, TILES.depth
            )
            second_stop = tl.where(expert & 1 == 1, pair_stop, start)
            leader, partner = _multiply(
                leader, partner, matrix, rows, tokens, start, second_stop, K, STORAGE, 1, None, TILES.depth
            )
        if STORAGE.decoder == MASK16:
            leader *= 2.0**-16
            partner *= 2.0**-16
    if STORAGE.dense:
        matrix = Matrix(projection.dense + tl.maximum(expert - 2 * pairs, 0) * size, None, None)
        dense_stop = tl.where(expert >= 2 * pairs, stop, start)
        leader, partner = _multiply(
            leader, partner, matrix, rows, tokens, start, dense_stop, K, STORAGE, None, None, TILES.depth
        )
    return leader, partner


@triton.jit
def _silu_mul(gate_up, TILES: tl.constexpr):
    """[tokens, rows / 2] of SiLU(gate) * up from products whose columns alternate between gate and up."""
    gate, up = tl.split(gate_up.reshape(TILES.tokens, TILES.rows // 2, 2))
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _store_tokens(out, width, channel, row, keep, value):
    """out[row, channel] = value [rows, channels] where kept and inside the width."""
    address = out + row.to(tl.int64)[:, None] * width + channel[None, :]
    tl.store(address, value.to(out.dtype.element_ty), mask=keep[:, None] & (channel[None, :] < width))


@triton.jit(do_not_specialize=["most", "top_k", "pairs"])
def gate_up_kernel(
    x, hidden, projection, blocks, most, top_k, pairs, hidden_size, intermediate, word_table,
    STORAGE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    index, row_tile = _place(most, tl.cdiv(2 * intermediate, TILES.rows), TILES.group)
    if index >= tl.load(blocks.used):
        return
    block = load_block(blocks.table, index)
    m = tl.arange(0, TILES.tokens)
    leader_slot = tl.load(blocks.order + block.leader_row + m, mask=m < block.leader_rows, other=0)
    partner_slot = tl.load(blocks.order + block.partner_row + m, mask=m < block.partner_rows, other=0)
    n = tl.arange(0, TILES.rows)
    row = tl.minimum((row_tile * TILES.rows + n) // 2, intermediate - 1) + n % 2 * intermediate
    tokens = Tokens(
        x + (leader_slot // top_k).to(tl.int64) * hidden_size, m < block.leader_rows,
        x + (partner_slot // top_k).to(tl.int64) * hidden_size, m < block.partner_rows,
    )  # fmt: skip
    leader, partner = _project(
        projection, word_table, block.expert, pairs, 2 * intermediate, hidden_size, row, tokens, 0, hidden_size,
        STORAGE, TILES,
    )  # fmt: skip
    channel = row_tile * (TILES.rows // 2) + tl.arange(0, TILES.rows // 2)
    _store_tokens(hidden, intermediate, channel, block.leader_row + m, m < block.leader_rows, _silu_mul(leader, TILES))
    if STORAGE.pairs and TILES.shared:
        value = _silu_mul(partner, TILES)
        _store_tokens(hidden, intermediate, channel, block.partner_row + m, m < block.partner_rows, value)


@triton.jit(do_not_specialize=["most", "slots", "pairs"])
def down_kernel(
    hidden, down, projection, blocks, most, slots, pairs, hidden_size, intermediate, word_table,
    STORAGE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    index, row_tile = _place(most, tl.cdiv(hidden_size, TILES.rows), TILES.group)
    if index >= tl.load(blocks.used):
        return
    block = load_block(blocks.table, index)
    m = tl.arange(0, TILES.tokens)
    channel = row_tile * TILES.rows + tl.arange(0, TILES.rows)
    depth = tl.cdiv(tl.cdiv(intermediate, TILES.depth), tl.num_programs(1)) * TILES.depth
    start = tl.program_id(1) * depth
    row = tl.minimum(channel, hidden_size - 1)
    tokens = Tokens(
        hidden + (block.leader_row + m).to(tl.int64) * intermediate, m < block.leader_rows,
        hidden + (block.partner_row + m).to(tl.int64) * intermediate, m < block.partner_rows,
    )  # fmt: skip
    leader, partner = _project(
        projection, word_table, block.expert, pairs, hidden_size, intermediate, row, tokens, start,
        tl.minimum(start + depth, intermediate), STORAGE, TILES,
    )  # fmt: skip
    down += tl.program_id(1).to(tl.int64) * slots * hidden_size
    slot = tl.load(blocks.order + block.leader_row + m, mask=m < block.leader_rows, other=0)
    _store_tokens(down, hidden_size, channel, slot, m < block.leader_rows, leader)
    if STORAGE.pairs and TILES.shared:
        slot = tl.load(blocks.order + block.partner_row + m, mask=m < block.partner_rows, other=0)
        _store_tokens(down, hidden_size, channel, slot, m < block.partner_rows, partner)


@triton.jit(do_not_specialize=["slots", "size"])
def combine_kernel(
    down, topk_weights, slot_expert, out, slots, size, hidden_size,
    TOP_K: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Slots without a local expert were never written: they are skipped, not multiplied by zero.

    The loops are unrolled so that all their loads are in flight together.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        slot = index // hidden_size * TOP_K + k
        routed = tl.load(slot_expert + slot, mask=index < size, other=-1) >= 0
        weight = tl.load(topk_weights + slot, mask=routed, other=0).to(tl.float32)
        for part in tl.static_range(SPLIT):
            row = (slot + part * slots).to(tl.int64) * hidden_size
            value = tl.load(down + row + index % hidden_size, mask=routed, other=0)
            total += weight * value.to(tl.float32)
    tl.store(out + index, total.to(tl.bfloat16), mask=index < size)
