"""Slots in the order of experts, and the table of token blocks.

A slot is one (token, k) of the router's choice.  A token block belongs to a pair, up to so many tokens of each
position, so that one load of the words serves both experts; or, where pairs are not shared, to one expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SLOTS_PER_PROGRAM = 128

# A row of the block table: local expert, its first row and number of rows, then its partner's in a shared block.
TABLE_COLUMNS = tl.constexpr(5)


class Blocks(NamedTuple):
    """Token blocks.  Tensors int32, or pointers to them in a kernel.

    order: the slot of every row.  table: a row of `TABLE_COLUMNS` per block.  used: the number of blocks, one element.
    """

    order: Any
    table: Any
    used: Any


class Block(NamedTuple):
    """A row of the block table."""

    expert: Any
    leader_row: Any
    leader_rows: Any
    partner_row: Any
    partner_rows: Any


def route(
    topk_ids: Tensor, expert_map: Tensor | None, experts: int, shared_pairs: int, tokens: int
) -> tuple[Blocks, int, Tensor]:
    """The blocks of up to `tokens` rows, the most that any routing of these slots can need, and every slot's local
    expert, int32 [slots], -1 for none.

    topk_ids: int [M, k]; experts: local ones; shared_pairs: the pairs, or 0 where a block belongs to one expert.
    """
    slots, groups = topk_ids.numel(), experts - shared_pairs
    filled = min(groups, slots)
    most = filled + (slots - filled) // tokens

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=topk_ids.device)

    slot_expert = scratch(slots)
    blocks = Blocks(scratch(slots), scratch(most, TABLE_COLUMNS.value), scratch(1))
    programs = (triton.cdiv(slots, SLOTS_PER_PROGRAM),)
    counts = slot_rank = None
    if programs != (1,):
        counts = torch.zeros(experts, dtype=torch.int32, device=topk_ids.device)
        slot_rank = scratch(slots)
        count_kernel[programs](topk_ids, expert_map, counts, slot_expert, slot_rank, slots, BLOCK=SLOTS_PER_PROGRAM)
    align_kernel[programs](
        topk_ids, expert_map, counts, slot_expert, slot_rank, blocks, slots, shared_pairs, groups,
        BLOCK=SLOTS_PER_PROGRAM, BLOCK_M=tokens, GROUPS=triton.next_power_of_2(groups),
        EXPERTS=triton.next_power_of_2(experts),
    )  # fmt: skip
    return blocks, most, slot_expert


@triton.jit
def load_block(table, index):
    """The `Block` of an index."""
    row = table + index * TABLE_COLUMNS
    return Block(tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4))


@triton.jit
def _local_expert(topk_ids, expert_map, slot, slots):
    expert = tl.load(topk_ids + slot, mask=slot < slots, other=-1).to(tl.int32)
    if expert_map is not None:
        expert = tl.load(expert_map + expert, mask=expert >= 0, other=-1)
    return expert


@triton.jit(do_not_specialize=["slots"])
def count_kernel(topk_ids, expert_map, counts, slot_expert, slot_rank, slots, BLOCK: tl.constexpr):
    """Ranks come from atomics: which of an expert's slots gets which row varies, and no result depends on it."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = _local_expert(topk_ids, expert_map, slot, slots)
    rank = tl.atomic_add(counts + expert, 1, mask=expert >= 0, sem="relaxed")
    tl.store(slot_expert + slot, expert, mask=slot < slots)
    tl.store(slot_rank + slot, rank, mask=slot < slots)


@triton.jit(do_not_specialize=["slots", "shared_pairs", "groups"])
def align_kernel(
    topk_ids, expert_map, counts, slot_expert, slot_rank, blocks, slots, shared_pairs, groups,
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
        tl.store(blocks.used, tl.sum(group_blocks))

    paired = expert < 2 * shared_pairs
    slot_group = tl.maximum(tl.where(paired, expert >> 1, expert - shared_pairs), 0)
    is_partner = paired & (expert & 1 == 1)
    leader_row = tl.gather(first_row, slot_group, 0)
    leader_rows = tl.gather(leader_rows, slot_group, 0)
    partner_row = leader_row + leader_rows
    partner_rows = tl.gather(partner_rows, slot_group, 0)
    tl.store(blocks.order + tl.where(is_partner, partner_row, leader_row) + rank, slot, mask=expert >= 0)

    # The slot that opens a block describes it; in a shared block both openers write the same row.
    row = blocks.table + (tl.gather(first_block, slot_group, 0) + rank // BLOCK_M) * TABLE_COLUMNS
    opens = (expert >= 0) & (rank % BLOCK_M == 0)
    tl.store(row, expert - is_partner.to(tl.int32), mask=opens)
    tl.store(row + 1, leader_row + rank, mask=opens)
    tl.store(row + 2, tl.minimum(leader_rows - rank, BLOCK_M), mask=opens)
    tl.store(row + 3, partner_row + rank, mask=opens)
    tl.store(row + 4, tl.minimum(partner_rows - rank, BLOCK_M), mask=opens)
