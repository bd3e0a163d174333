"""Compensation: the factor, and that it does what it is for - less error in the projections' outputs."""

import pytest
import torch
from torch import Tensor

from puzzlemoe_offline.calibration.statistics import ExpertStatistics, ProjectionInputs
from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_offline.pairing.lost import LOST
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.words import compensate
from puzzlemoe_offline.words.compensate import fit_compensated
from puzzlemoe_offline.words.factors import DAMPING, MomentsError, inverse_factors
from puzzlemoe_offline.words.nearest import BALANCE, PackedMatrix, column_importance, fit
from puzzlemoe_offline.words.pack import Losses, pack_pairs
from puzzlemoe_vllm.format.codes import CODES, TrellisCode, get_code

LEAST_SQUARES = PairRecipe(rule="least-squares")


def least_squares(name: str) -> PairRecipe:
    """A code's recipe by that rule."""
    return PairRecipe(code=name, rule="least-squares" if get_code(name).rules else None)


def observed(x: Tensor) -> ProjectionInputs:
    return ProjectionInputs(x.norm(dim=0), len(x), x.T @ x)


def correlated(tokens: int, columns: int) -> Tensor:
    """Inputs of which a quarter as many directions carry most of the energy."""
    return torch.randn(tokens, columns // 4) @ torch.randn(columns // 4, columns) + torch.randn(tokens, columns)


def compensated(name: str, weights, inputs, group: int | None) -> PackedMatrix:
    """One pair."""
    (packed,) = fit_compensated(get_code(name), [weights], inverse_factors(list(inputs)), group)
    return packed


def output_errors(name: str, packed: PackedMatrix, weights: tuple[Tensor, Tensor], x: list[Tensor]) -> list[float]:
    """||X W' - X V'|| / ||X W'|| of each expert."""
    code = get_code(name)
    decoded = [code.decode(packed.words, position, packed.steps).float() for position in (0, 1)]
    return [
        float((seen @ (weight.float() - value).T).norm() / (seen @ weight.float().T).norm())
        for weight, value, seen in zip(weights, decoded, x, strict=True)
    ]


def test_the_factor_inverts_the_damped_moments():
    torch.manual_seed(0)
    seen = observed(correlated(200, 48))
    factor = inverse_factors([seen])[0]
    moments = seen.moments / 200**BALANCE
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(48)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(48), rtol=0, atol=1e-3)
    assert not factor.tril(-1).any()


@pytest.mark.parametrize("size", [float("inf"), 1e38, float("nan")])
def test_moments_beyond_float32_are_refused(size):
    moments = torch.full((16, 16), size)
    with pytest.raises(MomentsError, match="the squares of the inputs leave float32"):
        inverse_factors([ProjectionInputs(torch.ones(16), 1, moments + moments)])


def test_moments_are_left_as_they_were():
    seen = observed(correlated(100, 32))
    before = seen.moments.clone()
    inverse_factors([seen])[0]
    assert torch.equal(seen.moments, before)


@pytest.mark.parametrize("name", list(CODES))
def test_it_lowers_the_error_of_both_outputs(name):
    torch.manual_seed(1)
    rows = 16 if isinstance(get_code(name), TrellisCode) else 96
    weights = tuple(torch.randn(rows, 256).bfloat16() for _ in (0, 1))
    x = [correlated(2000, 256), correlated(300, 256)]
    inputs = observed(x[0]), observed(x[1])
    group = 64 if get_code(name).has_steps else None
    plain = output_errors(
        name,
        fit(weights, column_importance(inputs, LEAST_SQUARES), least_squares(name), group),
        weights,
        x,
    )
    better = output_errors(name, compensated(name, weights, inputs, group), weights, x)
    assert all(after < 0.9 * before for after, before in zip(better, plain, strict=True))


@pytest.mark.parametrize("name", ["mask16", "angle8"])
def test_errors_go_on_into_later_panels(name, monkeypatch):
    torch.manual_seed(7)
    weights = tuple(torch.randn(16, 256).bfloat16() for _ in (0, 1))
    x = [correlated(2000, 256), correlated(300, 256)]
    inputs, group = (observed(x[0]), observed(x[1])), 64 if get_code(name).has_steps else None
    whole = compensated(name, weights, inputs, group)
    monkeypatch.setattr(compensate, "PANEL", 128)
    parted = compensated(name, weights, inputs, group)
    # Nearly all words: other roundings may turn a near tie, after which a row goes on differently, but as well.
    assert (whole.words == parted.words).float().mean() > 0.7
    errors = [output_errors(name, packed, weights, x) for packed in (whole, parted)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("name", list(CODES))
def test_without_correlation_there_is_nothing_to_push(name):
    torch.manual_seed(2)
    weights = tuple(torch.randn(16, 160).bfloat16() for _ in (0, 1))
    inputs = (ProjectionInputs(torch.ones(160), 1, torch.eye(160)),) * 2
    group = 32 if get_code(name).has_steps else None
    plain = fit(weights, column_importance(inputs, LEAST_SQUARES), least_squares(name), group)
    pushed = compensated(name, weights, inputs, group)
    code = get_code(name)
    decoded = [[code.decode(p.words, position, p.steps).float() for position in (0, 1)] for p in (plain, pushed)]
    if code.has_steps:
        assert torch.equal(plain.steps, pushed.steps)
    # Importance comes from the factor here, so near ties may fall to the other side; and the plain fit keeps the words
    # that gave its steps.
    assert torch.isclose(decoded[0][0], decoded[1][0], rtol=2.0**-6).float().mean() > (0.95 if code.has_steps else 0.99)
    errors = [sum(float((w.float() - v).square().sum()) for w, v in zip(weights, d, strict=True)) for d in decoded]
    assert 0.98 < errors[1] / errors[0] < 1.001


@pytest.mark.parametrize("name", list(CODES))
def test_an_expert_whose_inputs_are_zero_is_left_uncompensated(name):
    torch.manual_seed(4)
    weights = tuple(torch.randn(32, 128).bfloat16() for _ in (0, 1))
    inputs = observed(correlated(400, 128)), observed(torch.zeros(400, 128))
    assert torch.equal(inverse_factors([inputs[1]])[0], torch.eye(128))
    group = 64 if get_code(name).has_steps else None
    packed = compensated(name, weights, inputs, group)
    for position, weight in enumerate(weights):
        decoded = get_code(name).decode(packed.words, position, packed.steps).float()
        assert (decoded - weight.float()).norm() < (0.8 if position == 0 else LOST) * weight.float().norm()


def test_an_expert_with_fewer_tokens_than_columns_stays_stable():
    """Rank-deficient moments: the pushed weights must not grow from column to column."""
    torch.manual_seed(3)
    weights = tuple(torch.randn(64, 512).bfloat16() for _ in (0, 1))
    inputs = observed(correlated(4000, 512)), observed(correlated(40, 512))
    packed = compensated("angle8", weights, inputs, 128)
    for position, weight in enumerate(weights):
        decoded = get_code("angle8").decode(packed.words, position, packed.steps).float()
        assert decoded.norm() < 1.2 * weight.float().norm()
        assert (decoded - weight.float()).norm() < 0.5 * weight.float().norm()


def test_pairs_of_trellis_words_at_once_are_those_of_each_alone():
    torch.manual_seed(9)
    sizes = (32, 64), (32, 64), (64, 32)
    x, hidden = correlated(200, 64), correlated(200, 32) * torch.rand(32)
    statistics = ExpertStatistics.zeros(4, 64, 32, torch.device("cpu"), moments=True)
    statistics.observe(0, [90, 60, 48, 2], x, hidden, torch.ones(200))
    scales = 1.0, 3.0, 0.2, 0.1
    experts = [Expert(*((torch.randn(size) * scale).bfloat16() for size in sizes)) for scale in scales]
    members, ids, recipe = (
        [(experts[0], experts[1]), (experts[2], experts[3])],
        [(0, 1), (2, 3)],
        PairRecipe(code="trellis3"),
    )
    losses = [Losses(), Losses()]
    together = pack_pairs(members, ids, statistics, None, recipe, 32, losses)
    for number, pair in enumerate(together):
        own = Losses()
        (alone,) = pack_pairs([members[number]], [ids[number]], statistics, None, recipe, 32, [own])
        torch.testing.assert_close(losses[number].error, own.error, rtol=0.05, atol=0)
        for packed, expected in zip(pair, alone, strict=True):
            # Roundings of batched products may turn a near tie, after which a row of tiles goes on differently.
            assert packed.words.shape == expected.words.shape and packed.steps.shape == expected.steps.shape
            assert (packed.words == expected.words).all(dim=1).float().mean() > 0.5
