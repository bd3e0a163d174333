"""Which experts merge: every expert once, groups whole, the least used half at 25%, partners by chance or by cost."""

import subprocess
import sys
import time
from itertools import permutations

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puzzlemoe_offline.model.families import expert_groups
from puzzlemoe_offline.pairing.partners import LayerPairing, pair_experts, shared_choices


def costs_of(matrix: Tensor):
    return lambda pool: matrix[pool][:, pool]


def symmetric(experts: int, seed: int) -> Tensor:
    matrix = torch.rand(experts, experts, generator=torch.Generator().manual_seed(seed))
    return matrix + matrix.T


def total(pairing: LayerPairing, matrix: Tensor) -> float:
    return sum(float(matrix[pair]) for pair in pairing.pairs)


by_costs = st.sampled_from([None, costs_of(symmetric(160, 0))])


@settings(deadline=None)
@given(st.integers(2, 60), st.sampled_from([0.5, 0.25]), st.integers(0, 50), by_costs)
def test_every_expert_appears_once_and_merged_ones_come_in_pairs(experts, sparsity, seed, costs):
    pairing = pair_experts(experts, sparsity, 1, torch.arange(experts), seed, costs)
    assert sorted(pairing.order) == list(range(experts))
    assert pairing.merged % 2 == 0
    share = experts if sparsity == 0.5 else experts // 2
    assert share - pairing.merged in (0, 1)


@settings(deadline=None)
@given(
    st.sampled_from([2, 4, 8]), st.sampled_from([2, 4, 20]), st.sampled_from([0.5, 0.25]), st.integers(0, 9), by_costs
)
def test_groups_stay_whole(groups, size, sparsity, seed, costs):
    pairing = pair_experts(groups * size, sparsity, groups, torch.arange(groups * size), seed, costs)
    for start in range(0, groups * size, size):
        assert len({expert // size for expert in pairing.order[start : start + size]}) == 1
    assert pairing.merged == (groups if sparsity == 0.5 else groups // 2) * size


def test_a_quarter_merges_the_least_used_half():
    tokens = torch.tensor([9, 1, 8, 2, 7, 3, 6, 4])
    pairing = pair_experts(8, 0.25, 1, tokens, seed=0)
    assert sorted(pairing.order[:4]) == [1, 3, 5, 7]
    assert pairing.order[4:] == [0, 2, 4, 6]


def test_the_seed_decides():
    orders = [tuple(pair_experts(64, 0.5, 1, None, seed).order) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_partners_are_random_at_a_quarter_too():
    tokens = torch.arange(16)
    assert len({tuple(pair_experts(16, 0.25, 1, tokens, seed).order) for seed in range(8)}) > 4


def test_odd_groups_cannot_be_paired():
    with pytest.raises(ValueError, match="groups of 3"):
        pair_experts(9, 0.5, 3, None, 0)


def test_a_seed_gives_the_orders_that_earlier_versions_gave():
    assert pair_experts(8, 0.5, 1, None, 0).order == [1, 4, 0, 3, 2, 5, 6, 7]
    assert pair_experts(8, 0.25, 2, torch.arange(8), 5).order == [1, 0, 3, 2, 4, 5, 6, 7]


@pytest.mark.parametrize("experts", [16, 60])
def test_no_other_library_finds_partners_that_cost_less(experts):
    matrix = symmetric(experts, experts).double()
    graph = networkx.Graph()
    graph.add_weighted_edges_from(
        (a, b, float(matrix[a, b])) for b in range(experts) for a in range(b) if matrix[a, b] < 1.9
    )
    least = sum(float(matrix[pair]) for pair in networkx.min_weight_matching(graph))
    found = pair_experts(experts, 0.5, 1, None, 0, costs_of(matrix.masked_fill(matrix >= 1.9, torch.inf)))
    assert total(found, matrix) == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize("cost", [0.0, -3.0])
def test_equal_costs_give_the_same_partners_in_every_process(cost):
    """The library's own order of equal costs may differ from run to run."""
    program = (
        "import torch; from puzzlemoe_offline.pairing.partners import pair_experts; "
        f"print(pair_experts(40, 0.5, 1, None, 0, lambda pool: torch.full((40, 40), {cost})).order)"
    )
    orders = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(orders) == 1 and len(orders.pop()) > 80


@pytest.mark.parametrize("seed", range(5))
def test_no_other_partners_cost_less(seed):
    matrix = symmetric(7, seed)
    found = pair_experts(7, 0.5, 1, None, 0, costs_of(matrix))
    assert found.merged == 6
    assert total(found, matrix) == pytest.approx(
        min(total(LayerPairing([*o], 6), matrix) for o in permutations(range(7)))
    )


def test_costs_choose_partners_inside_groups_and_inside_the_merged_half():
    matrix = torch.ones(8, 8)
    for a, b in ((0, 3), (1, 2), (3, 4), (5, 7)):
        matrix[a, b] = matrix[b, a] = 0
    grouped = pair_experts(8, 0.5, 2, None, 0, costs_of(matrix))
    assert {frozenset(pair) for pair in grouped.pairs} == {frozenset(p) for p in ((0, 3), (1, 2), (5, 7), (4, 6))}
    quarter = pair_experts(8, 0.25, 1, torch.tensor([1, 1, 1, 1, 9, 9, 9, 9]), 0, costs_of(matrix))
    assert {frozenset(pair) for pair in quarter.pairs} == {frozenset((0, 3)), frozenset((1, 2))}


def test_matching_512_experts_takes_seconds():
    """One layer of Qwen3-Next has so many; of its 48 each is matched once."""
    matrix = symmetric(512, 1)
    began = time.process_time()
    pairing = pair_experts(512, 0.5, 1, None, 0, costs_of(matrix))
    assert time.process_time() - began < 10
    assert pairing.merged == 512 and total(pairing, matrix) < 0.1 * float(matrix.mean()) * 256


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sparsity", [0.5, 0.25])
def test_the_expectation_of_random_partners_is_the_mean_over_them(groups, sparsity):
    together = (symmetric(8, 3) * 100).long()
    tokens = torch.arange(8)
    drawn = [pair_experts(8, sparsity, groups, tokens, seed) for seed in range(400)]
    here, expected = shared_choices(drawn[0], together, groups)
    assert here == sum(int(together[pair]) for pair in drawn[0].pairs)
    assert sum(shared_choices(pairing, together, groups)[0] for pairing in drawn) / 400 == pytest.approx(
        expected, rel=0.05
    )


@pytest.mark.parametrize("topk_method", [None, "greedy", "group_limited_greedy"])
def test_groups_are_those_that_vllm_heeds(topk_method):
    assert expert_groups({"topk_method": topk_method, "n_group": 8}) == 8
    assert expert_groups({"topk_method": topk_method, "n_group": None}) == 1
    assert expert_groups({}) == 1
