"""Which experts merge: every expert once, groups whole, the least used half at 25%."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzlemoe_offline.pairing import pair_randomly


@given(st.integers(2, 130), st.sampled_from([0.5, 0.25]), st.integers(0, 50))
def test_every_expert_appears_once_and_merged_ones_come_in_pairs(experts, sparsity, seed):
    pairing = pair_randomly(experts, sparsity, 1, torch.arange(experts), seed)
    assert sorted(pairing.order) == list(range(experts))
    assert pairing.merged % 2 == 0
    share = experts if sparsity == 0.5 else experts // 2
    assert share - pairing.merged in (0, 1)


@given(st.sampled_from([2, 4, 8]), st.sampled_from([2, 4, 20]), st.sampled_from([0.5, 0.25]), st.integers(0, 9))
def test_groups_stay_whole(groups, size, sparsity, seed):
    pairing = pair_randomly(groups * size, sparsity, groups, torch.arange(groups * size), seed)
    for start in range(0, groups * size, size):
        assert len({expert // size for expert in pairing.order[start : start + size]}) == 1
    assert pairing.merged == (groups if sparsity == 0.5 else groups // 2) * size


def test_a_quarter_merges_the_least_used_half():
    tokens = torch.tensor([9, 1, 8, 2, 7, 3, 6, 4])
    pairing = pair_randomly(8, 0.25, 1, tokens, seed=0)
    assert sorted(pairing.order[:4]) == [1, 3, 5, 7]
    assert pairing.order[4:] == [0, 2, 4, 6]


def test_the_seed_decides():
    orders = [tuple(pair_randomly(64, 0.5, 1, None, seed).order) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_partners_are_random_at_a_quarter_too():
    tokens = torch.arange(16)
    assert len({tuple(pair_randomly(16, 0.25, 1, tokens, seed).order) for seed in range(8)}) > 4


def test_odd_groups_cannot_be_paired():
    with pytest.raises(ValueError, match="groups of 3"):
        pair_randomly(9, 0.5, 3, None, 0)
