"""Triton, no build step: what serves on GPUs where the CUDA library is not built.

Words stay in the checkpoint's row-major order and are decoded in registers on the way to the tensor cores.  A layer is
five launches whose grids follow from shapes alone:

    count     tokens of every local expert, and each slot's rank among its expert's; a slot is one (token, k)
    align     slots in the order of experts, and the table of token blocks; counts for itself when slots are few
    gate_up   hidden = SiLU(gate x) * up x, one row per slot in that order
    down      one row per slot in the router's order, in parts when K is split
    combine   the sum over top-k, weighted by the router

A token block belongs to a pair, up to BLOCK_M tokens of each position, so that one load of the words serves both
experts.  When experts have many tokens the words come from cache anyway, and a block belongs to one expert.

The tokens are the left operand of every product.  On Hopper this side decides the instruction: below 64 rows it is
mma.sync with decoded weights in registers, from 64 on wgmma with decoded weights in shared memory.  Weights on the left
would become wgmma operands in registers, which ptxas before CUDA 13.3 may reuse while the product still reads them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from puzzlemoe_vllm.backends import ExpertWeights
from puzzlemoe_vllm.format.codes import get_code, word_table

INTERPRETED = triton.knobs.runtime.interpret
OPERAND = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)
"""What products multiply.  The interpreter has no bf16 products; float32 holds every bf16."""

PTX = tl.constexpr(torch.version.cuda is not None and not INTERPRETED)
"""Whether kernels may hold PTX, which decodes two 16-bit words per instruction; Triton's own operators take one."""

CHUNK = 16384
"""Tokens per pass, which bounds the scratch memory."""

SLOTS_PER_PROGRAM = 128
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


def prepare(weights: ExpertWeights) -> None:
    """`fused_experts` reads the checkpoint's own order; only the table is fetched, which no graph capture could do."""
    if weights.w13_grid is not None:
        word_table(weights.code, weights.w13_grid.device)


def fused_experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, weights: ExpertWeights) -> Tensor:
    """sum_k topk_weights[m, k] * down(SiLU(gate x) * up x) over the local experts of row m.

    x: [M, H] bf16; topk_weights float32 [M, k]; topk_ids int [M, k].  Negative ids are skipped.
    Returns [M, H] bf16, equal bits for equal inputs; inputs are not written.  No host synchronisation.
    Raises TypeError when x or the words are not of the dtype that the kernels read.
    """
    if x.dtype != torch.bfloat16 or weights.w13_dense.dtype != torch.bfloat16:
        raise TypeError(f"the Triton backend computes in bfloat16, not {x.dtype} by {weights.w13_dense.dtype}")
    if weights.w13_pairs.dtype != get_code(weights.code).dtype:
        raise TypeError(f"{weights.code} words are {get_code(weights.code).dtype}, not {weights.w13_pairs.dtype}")
    x, topk_weights, topk_ids = x.contiguous(), topk_weights.contiguous(), topk_ids.contiguous()
    out = torch.empty_like(x)
    for start in range(0, x.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        _fused_experts(x[part], topk_weights[part], topk_ids[part], weights, out[part])
    return out


def _fused_experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, weights: ExpertWeights, out: Tensor) -> None:
    hidden_size = x.shape[1]
    intermediate = weights.w2_dense.shape[-1]
    top_k, slots = topk_ids.shape[1], topk_ids.numel()
    experts, pairs = weights.total, weights.merged // 2
    tiles = choose_tiles(slots, experts if weights.expert_map is None else weights.expert_map.shape[0])

    shared_pairs = pairs if tiles.shared else 0
    groups = experts - shared_pairs
    filled = min(groups, slots)
    blocks = filled + (slots - filled) // tiles.tokens  # the most that any routing of these slots can need

    def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    slot_expert, order = scratch(slots), scratch(slots)
    table, used_blocks = scratch(blocks, TABLE_COLUMNS.value), scratch(1)
    slot_programs = (triton.cdiv(slots, SLOTS_PER_PROGRAM),)
    counts = slot_rank = None
    if slot_programs != (1,):
        counts = torch.zeros(experts, dtype=torch.int32, device=x.device)
        slot_rank = scratch(slots)
        _count_kernel[slot_programs](
            topk_ids, weights.expert_map, counts, slot_expert, slot_rank, slots, BLOCK=SLOTS_PER_PROGRAM
        )
    _align_kernel[slot_programs](
        topk_ids, weights.expert_map, counts, slot_expert, slot_rank, order, table, used_blocks, slots, shared_pairs,
        groups, BLOCK=SLOTS_PER_PROGRAM, BLOCK_M=tiles.tokens, GROUPS=triton.next_power_of_2(groups),
        EXPERTS=triton.next_power_of_2(experts),
    )  # fmt: skip

    grid13, grid2 = weights.w13_grid, weights.w2_grid
    constants = dict(
        WORD_TABLE=None if grid13 is None else word_table(weights.code, x.device),
        GROUP_SIZE=None if grid13 is None else hidden_size // grid13.shape[2],
        CODE=weights.code, PAIRS=pairs > 0, DENSE=experts > 2 * pairs, SHARED=tiles.shared, GROUP=tiles.group,
        BLOCK_M=tiles.tokens, BLOCK_N=tiles.rows, BLOCK_K=tiles.depth,
        num_warps=tiles.warps, num_stages=tiles.stages, **({"maxnreg": tiles.registers} if PTX.value else {}),
    )  # fmt: skip
    hidden = scratch(slots, intermediate, dtype=torch.bfloat16)
    gate_up_programs = blocks * triton.cdiv(2 * intermediate, tiles.rows)
    _gate_up_kernel[(gate_up_programs,)](
        x, hidden, weights.w13_pairs, grid13, weights.w13_dense, order, table, used_blocks, blocks, top_k, pairs,
        hidden_size, intermediate, **constants,
    )  # fmt: skip

    down_programs = blocks * triton.cdiv(hidden_size, tiles.rows)
    split = choose_split(down_programs, intermediate, tiles.depth)
    # Parts are summed before any rounding; whole rows are rounded as a bf16 matrix product rounds them.
    down = scratch(split, slots, hidden_size, dtype=torch.bfloat16 if split == 1 else torch.float32)
    _down_kernel[(down_programs, split)](
        hidden, down, weights.w2_pairs, grid2, weights.w2_dense, order, table, used_blocks, blocks, slots, pairs,
        hidden_size, intermediate, **constants,
    )  # fmt: skip
    _combine_kernel[(triton.cdiv(out.numel(), VALUES_PER_PROGRAM),)](
        down, topk_weights, slot_expert, out, slots, out.numel(), hidden_size,
        TOP_K=top_k, SPLIT=split, BLOCK=VALUES_PER_PROGRAM,
    )  # fmt: skip


# A row of the block table: local expert, its first row and number of rows, then its partner's in a shared block.
TABLE_COLUMNS = tl.constexpr(5)


@triton.jit
def _local_expert(topk_ids, expert_map, slot, slots):
    expert = tl.load(topk_ids + slot, mask=slot < slots, other=-1).to(tl.int32)
    if expert_map is not None:
        expert = tl.load(expert_map + expert, mask=expert >= 0, other=-1)
    return expert


@triton.jit(do_not_specialize=["slots"])
def _count_kernel(topk_ids, expert_map, counts, slot_expert, slot_rank, slots, BLOCK: tl.constexpr):
    """Ranks come from atomics: which of an expert's slots gets which row varies, and no result depends on it."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = _local_expert(topk_ids, expert_map, slot, slots)
    rank = tl.atomic_add(counts + expert, 1, mask=expert >= 0, sem="relaxed")
    tl.store(slot_expert + slot, expert, mask=slot < slots)
    tl.store(slot_rank + slot, rank, mask=slot < slots)


@triton.jit(do_not_specialize=["slots", "shared_pairs", "groups"])
def _align_kernel(
    topk_ids, expert_map, counts, slot_expert, slot_rank, order, table, used_blocks, slots, shared_pairs, groups,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Groups are the units that blocks are cut from: the shared pairs, then single experts.

    Without counts this is the only program, and it counts for itself.
    """
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.arange(0, GROUPS)
    leader = group + tl.minimum(group, shared_pairs)
    if counts is None:
        expert = _local_expert(topk_ids, expert_map, slot, slots)
        tl.store(slot_expert + slot, expert, mask=slot < slots)
        earlier = (expert[:, None] == expert[None, :]) & (slot[None, :] < slot[:, None])
        rank = tl.sum(earlier.to(tl.int32), 1)
        rows = tl.histogram(expert, EXPERTS, mask=expert >= 0)
        leader_rows = tl.where(group < groups, tl.gather(rows, tl.minimum(leader, EXPERTS - 1), 0), 0)
        partner_rows = tl.where(group < shared_pairs, tl.gather(rows, tl.minimum(leader + 1, EXPERTS - 1), 0), 0)
    else:
        expert = tl.load(slot_expert + slot, mask=slot < slots, other=-1)
        rank = tl.load(slot_rank + slot, mask=expert >= 0, other=0)
        leader_rows = tl.load(counts + leader, mask=group < groups, other=0)
        partner_rows = tl.load(counts + leader + 1, mask=group < shared_pairs, other=0)
    group_rows = leader_rows + partner_rows
    group_blocks = tl.cdiv(tl.maximum(leader_rows, partner_rows), BLOCK_M)
    first_row = tl.cumsum(group_rows) - group_rows
    first_block = tl.cumsum(group_blocks) - group_blocks
    if tl.program_id(0) == 0:
        tl.store(used_blocks, tl.sum(group_blocks))

    paired = expert < 2 * shared_pairs
    slot_group = tl.maximum(tl.where(paired, expert >> 1, expert - shared_pairs), 0)
    is_partner = paired & (expert & 1 == 1)
    leader_row = tl.gather(first_row, slot_group, 0)
    leader_rows = tl.gather(leader_rows, slot_group, 0)
    partner_row = leader_row + leader_rows
    partner_rows = tl.gather(partner_rows, slot_group, 0)
    tl.store(order + tl.where(is_partner, partner_row, leader_row) + rank, slot, mask=expert >= 0)

    # The slot that opens a block describes it; in a shared block both openers write the same row.
    entry = table + (tl.gather(first_block, slot_group, 0) + rank // BLOCK_M) * TABLE_COLUMNS
    opens = (expert >= 0) & (rank % BLOCK_M == 0)
    tl.store(entry, expert - is_partner.to(tl.int32), mask=opens)
    tl.store(entry + 1, leader_row + rank, mask=opens)
    tl.store(entry + 2, tl.minimum(leader_rows - rank, BLOCK_M), mask=opens)
    tl.store(entry + 3, partner_row + rank, mask=opens)
    tl.store(entry + 4, tl.minimum(partner_rows - rank, BLOCK_M), mask=opens)


@triton.jit
def _load_words(words, rows, column, stop, K, CODE: tl.constexpr):
    """Words of some rows [N, 1] and columns [1, K] of a pair, one an element."""
    keep = column < stop
    if CODE == "angle6" or CODE == "mask6":
        # Of every 16 columns, eight bytes hold the upper four bits and four the lower two.
        place = words + rows * (K // 16 * 12) + column // 16 * 12
        upper = tl.load(place + column % 16 // 2, mask=keep, other=0).to(tl.int32) >> column % 2 * 4 & 15
        lower = tl.load(place + 8 + column % 16 // 4, mask=keep, other=0).to(tl.int32) >> column % 4 * 2 & 3
        return upper << 2 | lower
    else:
        return tl.load(words + rows * K + column, mask=keep, other=0)


@triton.jit
def _angle16_weights(words, position: tl.constexpr):
    direction = (words >> 12 & 3).to(tl.float32)
    multiplier = (15 - 4 * direction if position == 0 else 3 + 4 * direction) * 2.0**-4
    bits = (words & 0x0FFF).to(tl.int32)
    normal = ((bits << 16) + (112 << 23)).to(tl.float32, bitcast=True)
    weight = tl.where(bits < 128, bits.to(tl.float32) * 2.0**-21, normal) * multiplier
    return tl.where((words << position) < 0, -weight, weight).to(OPERAND)


@triton.jit
def _mask16_weights(words, position):
    """Times 2^16: with the mask as the top exponent bit, the stored exponent is 16 too high for an active weight and
    leaves a masked one below 4e-34, so no select and no addition is needed.
    """
    position = tl.full((), position, words.dtype)
    if PTX:
        # Bits that cross between the two words of a register land where the masks drop them.
        return tl.inline_asm_elementwise(
            """{ .reg .b32 shift, sign, mask, low;
            and.b32 shift, $2, 1;
            shl.b32 sign, $1, shift;
            shl.b32 mask, sign, 1;
            and.b32 sign, sign, 0x80008000;
            and.b32 mask, mask, 0x40004000;
            and.b32 low, $1, 0x0FFF0FFF;
            or.b32 low, low, sign;
            or.b32 $0, low, mask; }""",
            "=r,r,r", [words, position], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    sign = (words << position) & -0x8000
    mask = (words << (position + 1)) & 0x4000
    return (sign | mask | (words & 0x0FFF)).to(tl.bfloat16, bitcast=True)


@triton.jit
def _table_weights(words, position: tl.constexpr, steps, table):
    """Weights of one position of words with steps."""
    value = tl.load(table + words.to(tl.int32) * 2 + position)
    return (value.to(tl.float32) * steps.to(tl.float32)).to(OPERAND)


@triton.jit
def _place(blocks, row_tiles, GROUP: tl.constexpr):
    """(token block, row tile) of this program: GROUP blocks walk the row tiles together."""
    program = tl.program_id(0)
    first = program // (GROUP * row_tiles) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    within = program % (GROUP * row_tiles)
    return first + within % size, within // size


@triton.jit
def _decode(tile, position: tl.constexpr, steps, table, CODE: tl.constexpr):
    """Weights of one position, those of mask16 times 2^16; without a position the tile is weights already."""
    if position is None:
        return tile
    elif CODE == "mask16":
        return _mask16_weights(tile, position)
    elif CODE == "angle16":
        return _angle16_weights(tile, position)
    else:
        return _table_weights(tile, position, steps, table)


@triton.jit
def _multiply(
    leader, partner, weights, grid, rows, x_leader, keep_leader, x_partner, keep_partner, start, stop, K,
    WORD_TABLE, GROUP_SIZE: tl.constexpr, CODE: tl.constexpr,
    LEADER: tl.constexpr, PARTNER: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds the products of the leader's and the partner's tokens with some rows of weights over K in [start, stop).

    LEADER, PARTNER: the position of the words to decode for either; None takes the weights as they are and, for the
    partner, makes no product.
    """
    for k in range(start, stop, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)[None, :]
        steps = None
        if LEADER is None:
            tile = tl.load(weights + rows[:, None] * K + column, mask=column < stop, other=0)
        else:
            tile = _load_words(weights, rows[:, None], column, stop, K, CODE)
            if GROUP_SIZE is not None:
                group = grid + rows[:, None] * (K // GROUP_SIZE) + column // GROUP_SIZE
                steps = tl.load(group, mask=column < stop, other=0)
        tokens = tl.load(x_leader[:, None] + column, mask=keep_leader[:, None] & (column < stop), other=0)
        weight = _decode(tile, LEADER, steps, WORD_TABLE, CODE)
        leader = tl.dot(tokens.to(OPERAND), weight.to(OPERAND).T, leader)
        if PARTNER is not None:
            tokens = tl.load(x_partner[:, None] + column, mask=keep_partner[:, None] & (column < stop), other=0)
            weight = _decode(tile, PARTNER, steps, WORD_TABLE, CODE)
            partner = tl.dot(tokens.to(OPERAND), weight.to(OPERAND).T, partner)
    return leader, partner


@triton.jit
def _project(
    words, grid, dense, expert, pairs, N, K, rows, x_leader, keep_leader, x_partner, keep_partner, start, stop,
    WORD_TABLE, GROUP_SIZE: tl.constexpr, CODE: tl.constexpr,
    PAIRS: tl.constexpr, DENSE: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 products [BLOCK_M, BLOCK_N] of an expert's tokens with some rows of its matrix [N, K] and, in a shared
    block, of its partner's tokens with the partner's matrix.

    There is a loop for every way the matrix may be stored, and all but one make no steps: with branches instead, Triton
    would reserve shared memory for each.
    """
    leader = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    partner = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    size = N.to(tl.int64) * K
    if PAIRS:
        pair = tl.minimum(expert >> 1, pairs - 1)
        words += pair * (size // 16 * 12 if CODE == "angle6" or CODE == "mask6" else size)
        if GROUP_SIZE is not None:
            grid += pair * (size // GROUP_SIZE)
        pair_stop = tl.where(expert < 2 * pairs, stop, start)
        if SHARED:
            leader, partner = _multiply(
                leader, partner, words, grid, rows, x_leader, keep_leader, x_partner, keep_partner, start, pair_stop,
                K, WORD_TABLE, GROUP_SIZE, CODE, 0, 1, BLOCK_K,
            )  # fmt: skip
        else:
            first_stop = tl.where(expert & 1 == 0, pair_stop, start)
            leader, partner = _multiply(
                leader, partner, words, grid, rows, x_leader, keep_leader, x_partner, keep_partner, start, first_stop,
                K, WORD_TABLE, GROUP_SIZE, CODE, 0, None, BLOCK_K,
            )  # fmt: skip
            second_stop = tl.where(expert & 1 == 1, pair_stop, start)
            leader, partner = _multiply(
                leader, partner, words, grid, rows, x_leader, keep_leader, x_partner, keep_partner, start, second_stop,
                K, WORD_TABLE, GROUP_SIZE, CODE, 1, None, BLOCK_K,
            )  # fmt: skip
        if CODE == "mask16":
            leader *= 2.0**-16
            partner *= 2.0**-16
    if DENSE:
        dense += tl.maximum(expert - 2 * pairs, 0) * size
        dense_stop = tl.where(expert >= 2 * pairs, stop, start)
        leader, partner = _multiply(
            leader, partner, dense, None, rows, x_leader, keep_leader, x_partner, keep_partner, start, dense_stop, K,
            None, None, CODE, None, None, BLOCK_K,
        )  # fmt: skip
    return leader, partner


@triton.jit
def _silu_mul(gate_up, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N / 2] of SiLU(gate) * up from products whose columns alternate between gate and up."""
    gate, up = tl.split(gate_up.reshape(BLOCK_M, BLOCK_N // 2, 2))
    return gate * tl.sigmoid(gate) * up


@triton.jit(do_not_specialize=["blocks", "top_k", "pairs"])
def _gate_up_kernel(
    x, hidden, words, grid, dense, order, table, used_blocks, blocks, top_k, pairs, hidden_size, intermediate,
    WORD_TABLE, GROUP_SIZE: tl.constexpr, CODE: tl.constexpr,
    PAIRS: tl.constexpr, DENSE: tl.constexpr, SHARED: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block, row_tile = _place(blocks, tl.cdiv(2 * intermediate, BLOCK_N), GROUP)
    if block >= tl.load(used_blocks):
        return
    expert, leader_row, leader_rows, partner_row, partner_rows = _block(table, block)
    m = tl.arange(0, BLOCK_M)
    leader_slot = tl.load(order + leader_row + m, mask=m < leader_rows, other=0)
    partner_slot = tl.load(order + partner_row + m, mask=m < partner_rows, other=0)
    n = tl.arange(0, BLOCK_N)
    row = tl.minimum((row_tile * BLOCK_N + n) // 2, intermediate - 1) + n % 2 * intermediate
    leader, partner = _project(
        words, grid, dense, expert, pairs, 2 * intermediate, hidden_size, row,
        x + (leader_slot // top_k).to(tl.int64) * hidden_size, m < leader_rows,
        x + (partner_slot // top_k).to(tl.int64) * hidden_size, m < partner_rows, 0, hidden_size,
        WORD_TABLE, GROUP_SIZE, CODE, PAIRS, DENSE, SHARED, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    channel = row_tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    _store_tokens(hidden, intermediate, channel, leader_row + m, m < leader_rows, _silu_mul(leader, BLOCK_M, BLOCK_N))
    if PAIRS and SHARED:
        value = _silu_mul(partner, BLOCK_M, BLOCK_N)
        _store_tokens(hidden, intermediate, channel, partner_row + m, m < partner_rows, value)


@triton.jit(do_not_specialize=["blocks", "slots", "pairs"])
def _down_kernel(
    hidden, down, words, grid, dense, order, table, used_blocks, blocks, slots, pairs, hidden_size, intermediate,
    WORD_TABLE, GROUP_SIZE: tl.constexpr, CODE: tl.constexpr,
    PAIRS: tl.constexpr, DENSE: tl.constexpr, SHARED: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block, row_tile = _place(blocks, tl.cdiv(hidden_size, BLOCK_N), GROUP)
    if block >= tl.load(used_blocks):
        return
    expert, leader_row, leader_rows, partner_row, partner_rows = _block(table, block)
    m = tl.arange(0, BLOCK_M)
    channel = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.cdiv(tl.cdiv(intermediate, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    start = tl.program_id(1) * depth
    leader, partner = _project(
        words, grid, dense, expert, pairs, hidden_size, intermediate, tl.minimum(channel, hidden_size - 1),
        hidden + (leader_row + m).to(tl.int64) * intermediate, m < leader_rows,
        hidden + (partner_row + m).to(tl.int64) * intermediate, m < partner_rows,
        start, tl.minimum(start + depth, intermediate),
        WORD_TABLE, GROUP_SIZE, CODE, PAIRS, DENSE, SHARED, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    down += tl.program_id(1).to(tl.int64) * slots * hidden_size
    slot = tl.load(order + leader_row + m, mask=m < leader_rows, other=0)
    _store_tokens(down, hidden_size, channel, slot, m < leader_rows, leader)
    if PAIRS and SHARED:
        slot = tl.load(order + partner_row + m, mask=m < partner_rows, other=0)
        _store_tokens(down, hidden_size, channel, slot, m < partner_rows, partner)


@triton.jit
def _block(table, block):
    entry = table + block * TABLE_COLUMNS
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)


@triton.jit
def _store_tokens(out, width, channel, row, keep, value):
    """out[row, channel] = value [rows, channels] where kept and inside the width."""
    address = out + row.to(tl.int64)[:, None] * width + channel[None, :]
    tl.store(address, value.to(out.dtype.element_ty), mask=keep[:, None] & (channel[None, :] < width))


@triton.jit(do_not_specialize=["slots", "size"])
def _combine_kernel(
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
