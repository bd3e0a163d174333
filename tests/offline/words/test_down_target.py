"""Down projections make up for what packed gate and up projections have lost."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from puzzlemoe_offline.calibration.routed_tokens import RoutedTokens
from puzzlemoe_offline.calibration.statistics import FEW_TOKENS, ExpertStatistics
from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.words import down_target
from puzzlemoe_offline.words.down_target import CORRECTION_DAMPING, DownInputs
from puzzlemoe_offline.words.factors import MomentsError, inverse_factors
from puzzlemoe_offline.words.pack import Losses, pack_pairs
from puzzlemoe_vllm.format.codes import get_code

HIDDEN, INNER = 64, 96


def expert(scale: float = 0.3) -> Expert:
    sizes = (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    return Expert(*((torch.randn(size) * scale).bfloat16() for size in sizes))


def inputs(count: int) -> Tensor:
    """Of which a few directions carry most of the energy."""
    directions = torch.randn(HIDDEN // 8, HIDDEN, generator=torch.Generator().manual_seed(4))
    return torch.randn(count, HIDDEN // 8) @ directions / 3 + torch.randn(count, HIDDEN) / 3


def routed(count: int, experts: int = 2) -> tuple[RoutedTokens, ExpertStatistics, Tensor, Tensor]:
    """Tokens that all experts get, with random router's weights; what they are, [count, H], and those, [count, E]."""
    x, weights = inputs(count), torch.rand(count, experts)
    tokens = RoutedTokens(experts)
    for rows in torch.arange(count).split(100):
        tokens.record(x[rows], torch.arange(experts).expand(len(rows), -1), weights[rows], x[rows])
    statistics = ExpertStatistics.zeros(experts, HIDDEN, INNER, torch.device("cpu"), True, False, True)
    return tokens, statistics, x, weights


def test_the_target_is_the_damped_least_squares_solution():
    torch.manual_seed(1)
    exact, (tokens, statistics, x, weights) = expert(), routed(300)
    noisy = replace(exact, gate=exact.gate + 0.1 * torch.randn(INNER, HIDDEN).bfloat16())
    statistics.observe(0, [300], x, exact.hidden(x), weights[:, 0])
    found = DownInputs.of(exact, noisy, 0, tokens, statistics.inputs(0, 2))
    target = found.target(exact.down, inverse_factors([found.seen], CORRECTION_DAMPING)[0])
    wanted, seen = ((each.hidden(x) * weights[:, :1]).double() for each in (exact, noisy))
    moments = seen.T @ seen
    damped = moments + CORRECTION_DAMPING * moments.diagonal().mean() * torch.eye(INNER)
    down = exact.down.double()
    expected = down + torch.linalg.solve(damped, seen.T @ (wanted - seen) @ down.T).T
    assert (target - expected).norm() <= 1e-3 * (expected - down).norm()
    torch.testing.assert_close(found.seen.moments.double(), moments, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.seen.norms.double(), seen.norm(dim=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("together", [32, 40, INNER])
def test_moments_by_blocks_are_those_of_one_product(together, monkeypatch):
    torch.manual_seed(6)
    exact, (tokens, statistics, x, weights) = expert(), routed(300)
    statistics.observe(0, [300], x, exact.hidden(x), weights[:, 0])
    monkeypatch.setattr(down_target, "MOMENTS_TOGETHER", together)
    moments = DownInputs.of(exact, exact, 0, tokens, statistics.inputs(0, 2)).seen.moments
    seen = exact.hidden(x).double() * weights[:, :1]
    torch.testing.assert_close(moments.double(), seen.T @ seen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [0, FEW_TOKENS - 1])
def test_few_tokens_leave_the_weights(count):
    torch.manual_seed(2)
    exact, (tokens, statistics, x, weights) = expert(), routed(count)
    statistics.observe(0, [count], x, exact.hidden(x), weights[:, 0])
    seen = statistics.inputs(0, 2, flat=True)
    found = DownInputs.of(exact, expert(), 0, tokens, seen)
    assert torch.equal(
        found.target(exact.down, inverse_factors([found.seen], CORRECTION_DAMPING)[0]), exact.down.float()
    )
    assert torch.equal(found.seen.norms, seen.norms)


def test_outputs_beyond_float32_are_refused():
    torch.manual_seed(5)
    exact, (tokens, statistics, x, weights) = expert(), routed(100)
    statistics.observe(0, [100], x, exact.hidden(x), weights[:, 0])
    huge = replace(exact, down=exact.down * 1e37)
    found = DownInputs.of(huge, replace(exact, gate=-exact.gate), 0, tokens, statistics.inputs(0, 2))
    with pytest.raises(MomentsError, match="outputs of this projection leave float32"):
        found.target(huge.down, inverse_factors([found.seen], CORRECTION_DAMPING)[0])


@pytest.mark.parametrize("code", ["angle6", "trellis3"])
def test_experts_lose_less_with_it(code):
    torch.manual_seed(3)
    tokens, statistics, x, weights = routed(1000)
    pair = expert(), expert()
    for number, its in enumerate(pair):
        statistics.observe(number, [len(x)], x, its.hidden(x), weights[:, number])
    moments = [(weights[:, number, None] * its.hidden(x)) for number, its in enumerate(pair)]
    statistics.hidden_moments = torch.stack([rows.T @ rows for rows in moments])
    recipe = PairRecipe(code=code, compensate=True)
    for seen in (x, inputs(1000)):
        lost = []
        for given in (tokens, None):
            losses = Losses()
            (packed,) = pack_pairs([pair], [(0, 1)], statistics, given, recipe, 32, [losses])
            output = 0.0
            for position, its in enumerate(pair):
                merged = Expert(*(get_code(code).decode(each.words, position, each.steps) for each in packed))
                output += float((merged.output(seen) - its.output(seen)).square().sum())
            lost.append(output)
        assert lost[0] < 0.95 * lost[1]
