"""The CUDA library's encoder of trellis words against an exact Viterbi search in torch, by the cost of its words."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from puzzlemoe_offline.words.trellis_kernels import encode
from puzzlemoe_vllm.backends import cuda
from puzzlemoe_vllm.format.codes import UnencodableWeight
from puzzlemoe_vllm.format.codes.trellis import CODES, PLACES, TrellisCode, places_of, values

REASON = cuda.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

ALL = pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
ERRORS = {8: 0.00488, 6: 0.0181, 5: 0.0355, 4: 0.0697, 3: 0.1379}
"""Relative squared errors of normal weights with the best step."""

SEAM = 48
"""Places before and after the seam that both searches look at first."""


def path_costs(code: TrellisCode, words: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted squared errors float64 [tiles] of stored words."""
    state = places_of(code.states(words.view(-1, 32 * code.bits)))[:, 0]
    decoded = torch.stack(values(state), dim=-1).double()
    return (weights.double() * (decoded - targets.double()) ** 2).sum(dim=(1, 2))


class Search:
    """Viterbi over places of one tile, float64: every predecessor of every state."""

    def __init__(self, code: TrellisCode, device: str):
        self.branches, self.groups = 1 << code.bits, 1 << code.state_bits - code.bits
        state = torch.arange(1 << code.state_bits, device=device)
        self.values = torch.stack(values(state)).double()
        self.before = (state % self.groups).view(self.groups, self.branches)

    def forward(self, cost: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Costs of groups after places [places, 2] of those before, and the best branches of each place."""
        chosen = []
        for target, weight in zip(targets.double(), weights.double(), strict=True):
            errors = (weight[:, None] * (self.values - target[:, None]) ** 2).sum(dim=0)
            cost, branch = (cost[self.before] + errors.view(self.before.shape)).min(dim=1)
            chosen.append(branch)
        return cost, chosen

    def cost(self, targets: Tensor, weights: Tensor) -> float:
        """Of the best cycle through the group that the seam's neighbourhood prefers."""
        free = torch.zeros(self.groups, dtype=torch.double, device=targets.device)
        near = torch.arange(-SEAM, SEAM) % PLACES
        cost, chosen = self.forward(free, targets[near], weights[near])
        group = int(cost.argmin())
        for branch in reversed(chosen[SEAM:]):
            group = int(self.before[group, branch[group]])
        closed = torch.full_like(free, float("inf"))
        closed[group] = 0
        return float(self.forward(closed, targets, weights)[0][group])


def normal(code: TrellisCode, tiles: int) -> tuple[Tensor, Tensor]:
    """Targets and equal weights."""
    return torch.randn(tiles, PLACES, 2, device="cuda") / code.unit_step, torch.ones(tiles, PLACES, 2, device="cuda")


def assert_near_best(code: TrellisCode, targets: Tensor, weights: Tensor, tolerance: float = 0.005) -> None:
    search = Search(code, "cuda")
    """In the mean; that of one tile may be more, where the choice of its seam is a near tie."""
    found = path_costs(code, encode(code, targets, weights), targets, weights)
    best = torch.tensor([search.cost(*tile) for tile in zip(targets, weights, strict=True)], device="cuda")
    assert (found.sum() / best.sum()).item() <= 1 + tolerance
    assert (found / best).max().item() <= 1.05


@ALL
def test_normal_pairs(code):
    targets, weights = normal(code, 1000)
    found = path_costs(code, encode(code, targets, weights), targets, weights)
    error = (found.sum() / (targets.double() ** 2).sum()).item()
    print(f"\n{code.name}: {error:.5f}")
    assert error <= 1.01 * ERRORS[code.bits]


@ALL
def test_costs_are_nearly_the_least(code):
    assert_near_best(code, *normal(code, 16), tolerance=0.002)


@ALL
@pytest.mark.parametrize("tiles", [1, 2, 3, 19])
def test_numbers_of_tiles(code, tiles):
    """A tile's words do not depend on those beside it, and are the same each time."""
    targets, weights = normal(code, tiles)
    words = encode(code, targets, weights)
    assert torch.equal(words, encode(code, targets, weights))
    alone = [encode(code, targets[i : i + 1], weights[i : i + 1]) for i in range(tiles)]
    assert torch.equal(words, torch.cat(alone))


@ALL
def test_uneven_weights(code):
    targets, weights = normal(code, 8)
    weights *= 10 ** (6 * torch.rand_like(weights) - 3)
    assert_near_best(code, targets, weights)
    weights[:, :, 0] *= 0.01
    assert_near_best(code, targets, weights * 1e-12)


@ALL
def test_zeros_in_weights(code):
    targets, weights = normal(code, 8)
    weights *= torch.rand_like(weights) < 0.7
    weights[1, 50:150] = 0
    assert_near_best(code, targets, weights)
    weights[:] = 0
    assert path_costs(code, encode(code, targets, weights), targets, weights).sum() == 0


@ALL
@pytest.mark.parametrize("factor", [4.0, 100.0, 1e6, 1e30])
def test_huge_targets(code, factor):
    targets, weights = normal(code, 8)
    targets[0, 3], targets[1, 250:], targets[2] = factor * targets[0, 3], factor * targets[1, 250:], factor * targets[2]
    assert_near_best(code, targets, weights)


@ALL
def test_many_tiles_are_coded_as_few(code):
    """However many tiles share a block."""
    targets, weights = normal(code, 5000)
    words = encode(code, targets, weights)
    for some in (slice(0, 3), slice(2100, 2103), slice(4990, 5000)):
        assert torch.equal(words[some], encode(code, targets[some], weights[some]))


def test_refusals():
    targets, weights = normal(CODES[0], 2)
    assert encode(CODES[0], targets[:0], weights[:0]).shape == (0, 256)
    for bad in (float("nan"), float("inf")):
        wrong = targets.clone()
        wrong[1, 17, 1] = bad
        with pytest.raises(UnencodableWeight, match="NaN or infinite"):
            encode(CODES[0], wrong, weights)
        wrong = weights.clone()
        wrong[1, 17, 1] = bad
        with pytest.raises(ValueError, match="finite"):
            encode(CODES[0], targets, wrong)
    with pytest.raises(ValueError, match="below 0"):
        encode(CODES[0], targets, -weights)
