"""Eq. 1-8 against their definition, entry by entry, in exact rational arithmetic."""

from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzlemoe_offline.words.paper_rule import merge_pair

TAU = Fraction(2, 5)
bf16 = st.integers(-255, 255).flatmap(lambda m: st.integers(-14, 4).map(lambda e: m * 2.0**e / 128))
norm = st.integers(0, 64).map(float)


def by_definition(w0: float, w1: float, n0: float, n1: float) -> tuple[Fraction, bool, bool]:
    """(magnitude, mask of 0, mask of 1) of one entry."""
    a, b = abs(Fraction(w0)), abs(Fraction(w1))
    if a + b == 0 or abs(a - b) / (a + b) <= TAU:
        return (a + b) / 2, True, True
    s0, s1 = a * Fraction(n0), b * Fraction(n1)
    first = s0 > s1 or (s0 == s1 and a >= b)
    return (a if first else b), first, not first


@settings(max_examples=500)
@given(bf16, bf16, norm, norm)
def test_an_entry_follows_the_definition(w0, w1, n0, n1):
    pair = merge_pair(torch.tensor([[w0]]), torch.tensor([[w1]]), torch.tensor([n0]), torch.tensor([n1]), 0.4)
    magnitude, mask0, mask1 = by_definition(w0, w1, n0, n1)
    assert Fraction(pair.magnitude.item()) == magnitude
    assert (pair.mask(0).item(), pair.mask(1).item()) == (mask0, mask1)
    if w0:
        assert pair.negative[0].item() == (w0 < 0)
    if w1:
        assert pair.negative[1].item() == (w1 < 0)


@given(bf16, bf16, norm, norm, st.sampled_from([0.0, 0.1, 0.4, 1.0]))
def test_swapping_the_experts_swaps_the_result(w0, w1, n0, n1, tau):
    weights, norms = [torch.tensor([[w]]) for w in (w0, w1)], [torch.tensor([n]) for n in (n0, n1)]
    pair = merge_pair(*weights, *norms, tau)
    swapped = merge_pair(*reversed(weights), *reversed(norms), tau)
    tie = abs(w0) == abs(w1)
    assert pair.magnitude.equal(swapped.magnitude)
    assert tie or pair.mask(0).equal(swapped.mask(1))


def test_the_threshold_itself_is_similar():
    pair = merge_pair(torch.tensor([[7.0]]), torch.tensor([[-3.0]]), torch.ones(1), torch.ones(1), 0.4)
    assert pair.magnitude.item() == 5.0
    assert (pair.weight(0).item(), pair.weight(1).item()) == (5.0, -5.0)


def test_tau_one_shares_every_entry_and_tau_zero_only_equal_ones():
    w0, w1 = torch.randn(64, 64), torch.randn(64, 64)
    ones = torch.ones(64)
    everything = merge_pair(w0, w1, ones, ones, 1.0)
    assert everything.mask(0).all() and everything.mask(1).all()
    nothing = merge_pair(w0, w1, ones, ones, 0.0)
    assert not (nothing.mask(0) & nothing.mask(1)).any()
    assert (nothing.mask(0) | nothing.mask(1)).all()


def test_each_expert_keeps_its_own_sign_and_salient_weights_are_untouched():
    w0, w1 = torch.randn(128, 96), torch.randn(128, 96)
    n0, n1 = torch.rand(96), torch.rand(96)
    pair = merge_pair(w0, w1, n0, n1, 0.4)
    for weight, position in ((w0, 0), (w1, 1)):
        kept = pair.weight(position)
        assert ((kept == 0) | (kept.sign() == weight.sign())).all()
        alone = pair.mask(position) & ~pair.mask(1 - position)
        assert alone.any() and torch.equal(kept[alone], weight[alone])


def test_a_column_that_no_token_touched_keeps_the_larger_weight():
    pair = merge_pair(torch.tensor([[0.1]]), torch.tensor([[0.9]]), torch.zeros(1), torch.zeros(1), 0.4)
    assert (pair.weight(0).item(), round(pair.weight(1).item(), 6)) == (0.0, 0.9)
