"""The plan that every block of a launch makes for itself of few slots, on the host: what cuda/routing.cu would plan."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from support.host_compiler import emulated_library, needs_compiler
from support.token_groups import Choices, token_groups

SOURCE = Path(__file__).with_name("few_slots.cpp")

pytestmark = needs_compiler


def agrees(planner: ctypes.CDLL, ids: list[int], pairs: int, dense: int, part: int, on_a_rank: bool) -> bool:
    """Whether it plans what it should for slots of these local experts, below 0: none."""
    experts = 2 * pairs + dense
    expected_order = [slot for expert in range(experts) for slot, own in enumerate(ids) if own == expert]
    expected = token_groups([ids.count(expert) for expert in range(experts)], part, pairs)
    expert_map = torch.full((2 * experts,), -1, dtype=torch.int32)
    expert_map[experts // 2 : experts // 2 + experts] = torch.arange(experts)
    chosen = torch.tensor([own + experts // 2 if on_a_rank and own >= 0 else own for own in ids], dtype=torch.int32)
    if on_a_rank:
        chosen[torch.tensor(ids) < 0] = 0  # an expert of another rank
    choices = Choices(chosen.data_ptr(), expert_map.data_ptr() if on_a_rank else None, len(ids), 1, pairs, dense)
    counts, groups = torch.empty(2, dtype=torch.int32), torch.empty(len(ids), 8, dtype=torch.int32)
    order = torch.empty(len(ids), dtype=torch.int32)
    places = [tensor.data_ptr() for tensor in (counts, groups, order)]
    deal_of = planner.plan(ctypes.byref(choices), part, *map(ctypes.c_void_p, places))
    groups[groups[:, 7] == 0, 5] = 0
    groups[groups[:, 7] == 0, 3] &= 1
    of_pairs = int((expected[:, 0] < pairs).sum())
    return (
        deal_of == max(len(expected) - 1, 0)
        and counts.tolist() == [of_pairs, len(expected)]
        and torch.equal(groups[: len(expected)], expected)
        and order[: len(expected_order)].tolist() == expected_order
    )


def routings(most: int) -> list[tuple[list[int], int, int, int, bool]]:
    """Local experts of slots, pairs, dense experts, tokens of a part, and whether there are other ranks."""
    draw = torch.Generator().manual_seed(0)
    cases = []
    sizes = [
        *((1, 4, 0), (2, 4, 0), (8, 64, 0), (32, 64, 0), (most, 64, 0), (most, 4, 0), (most - 1, 3, 2), (40, 1, 0)),
        *((40, 0, 1), (5, 0, 7), (most, 100, 56), (3, 256, 0)),
    ]
    for number, (slots, pairs, dense) in enumerate(sizes):
        for part in (8, 16, 64):
            experts = 2 * pairs + dense
            ids = torch.randint(-1, experts, (slots,), generator=draw).tolist()
            cases.append((ids, pairs, dense, part, number % 2 == 1 and experts % 2 == 0))
    cases.append(([-1] * 6, 4, 0, 16, False))
    cases.append(([3] * most, 4, 0, 16, False))  # the second of a pair alone
    return cases


def test_it_is_the_plan_of_the_kernels_for_many(tmp_path):
    planner = emulated_library(SOURCE, tmp_path)
    for case in routings(planner.few_slots()):
        assert agrees(planner, *case), case


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("&& first + i < slot", "&& first + i <= slot"),
        ("&& !(second && partners > 0)", ""),
        ("second ? own : partners", "partners"),
        ("first + i < lower", "first + i <= lower"),
        ("first + i < of_pairs", "first + i <= of_pairs"),
        ("expert ^ 1 : -2", "expert ^ 1 : expert ^ 1"),
        ("    store_shared_4(kUnitGroups + 4 * slot, 0);\n", ""),
        ("groups == slot + 1", "pair_groups == slot + 1"),
    ],
)
def test_a_mistake_in_it_would_be_found(right, wrong, tmp_path):
    planner = emulated_library(SOURCE, tmp_path, [("sm90/few_slots.cuh", right, wrong)])
    assert not all(agrees(planner, *case) for case in routings(planner.few_slots()))
