"""The fits are the best words: against every word that a code has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puzzlemoe_offline.calibration.statistics import ExpertStatistics, ProjectionInputs
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.words.nearest import (
    column_importance,
    fit,
    fit_angle16,
    fit_mask16,
    fit_table,
    nearest,
    stored_steps,
)
from puzzlemoe_vllm.format.codes import CODES, TableCode, UnencodableWeight, get_code

LEAST_SQUARES = PairRecipe(rule="least-squares")


def least_squares(name: str) -> PairRecipe:
    """A code's recipe by that rule."""
    return PairRecipe(code=name, rule="least-squares" if get_code(name).rules else None)


TABLE_CODES = [name for name, code in CODES.items() if isinstance(code, TableCode)]
weight = st.floats(-4, 4, width=32).map(lambda value: torch.tensor(value).bfloat16().item())
importance_of = st.floats(2.0**-10, 2.0**10, width=32)


def column(value: float) -> Tensor:
    return torch.tensor([[value]])


def error_of(decoded: list[Tensor], w0: float, w1: float, a0: float, a1: float) -> Tensor:
    return a0 * (decoded[0].double() - w0) ** 2 + a1 * (decoded[1].double() - w1) ** 2


def every_word(name: str) -> list[Tensor]:
    """What all 16-bit words decode to, by position."""
    words = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    return [get_code(name).decode(words, position) for position in (0, 1)]


EVERY = {name: every_word(name) for name in ("mask16", "angle16")}


@settings(deadline=None)
@given(weight, weight, importance_of, importance_of)
def test_least_squares_masks_are_the_best_of_all_words(w0, w1, a0, a1):
    code = get_code("mask16")
    words = fit_mask16(code, (column(w0), column(w1)), (torch.tensor([a0]), torch.tensor([a1])), None).words
    found = error_of([code.decode(words, position) for position in (0, 1)], w0, w1, a0, a1).item()
    best = error_of(EVERY["mask16"], w0, w1, a0, a1).min().item()
    # A magnitude that is not a bf16 is rounded after its state was chosen.
    assert found**0.5 <= best**0.5 + (a0 + a1) ** 0.5 * 2.0**-8 * max(abs(w0), abs(w1), 2.0**-7)


@settings(deadline=None)
@given(weight, weight, importance_of, importance_of)
def test_angle16_is_the_best_of_all_words(w0, w1, a0, a1):
    code = get_code("angle16")
    words = fit_angle16(code, (column(w0), column(w1)), (torch.tensor([a0]), torch.tensor([a1])), None).words
    found = error_of([code.decode(words, position) for position in (0, 1)], w0, w1, a0, a1).item()
    best = error_of(EVERY["angle16"], w0, w1, a0, a1).min().item()
    # The magnitude, and the products with its multipliers, are rounded after the direction was chosen.
    assert found**0.5 <= best**0.5 + (a0 + a1) ** 0.5 * 2.0**-7 * max(abs(w0), abs(w1), 2.0**-12)


@pytest.mark.parametrize("name", TABLE_CODES)
def test_nearest_is_the_best_of_all_words(name):
    code = get_code(name)
    torch.manual_seed(0)
    pair, step, importance = torch.randn(2, 40, 3, 32).abs(), 0.5 + torch.rand(40, 3), 0.1 + torch.rand(2, 1, 3, 32)
    magnitudes = code.magnitudes
    index, score = nearest(magnitudes, pair, step, importance)
    values = magnitudes.T[:, :, None, None, None] * step[..., None]
    errors = (importance[:, None] * (pair[:, None] - values).square()).sum(dim=0)
    torch.testing.assert_close(errors.gather(0, index.long()[None])[0], errors.amin(dim=0), rtol=1e-4, atol=1e-5)
    energy = (importance * pair.square()).sum(dim=0)
    torch.testing.assert_close(energy + 2 * step[..., None].square() * score, errors.amin(dim=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TABLE_CODES)
def test_no_other_step_is_much_better(name):
    code = get_code(name)
    torch.manual_seed(1)
    weights = torch.randn(8, 128).bfloat16(), 2 * torch.randn(8, 128).bfloat16()
    importance = torch.rand(128) + 0.5, torch.rand(128) + 0.5

    def error(words: Tensor, steps: Tensor) -> Tensor:
        decoded = [code.decode(words, position, steps).float() for position in (0, 1)]
        return sum(a * (w.float() - v).square() for a, w, v in zip(importance, weights, decoded, strict=True)).sum(
            dim=1
        )

    packed = fit_table(code, weights, importance, 128)
    found = error(packed.words, packed.steps)
    magnitudes, words = code.magnitudes, code.words
    pair = torch.stack([w.float().abs() for w in weights])[:, :, None]
    for factor in torch.linspace(0.5, 2, 61):
        steps = (packed.steps.float() * factor).bfloat16()
        index = nearest(magnitudes, pair, steps.float(), torch.stack(importance)[:, None, None])[0][:, 0].int()
        other = code.pack(words[index, torch.signbit(weights[0]).int(), torch.signbit(weights[1]).int()])
        assert found.sum() <= 1.05 * error(other, steps).sum()


@pytest.mark.parametrize("name", TABLE_CODES)
def test_steps_scale_with_the_weights_and_zeros_stay_zero(name):
    code = get_code(name)
    torch.manual_seed(2)
    weights, ones = [torch.randn(4, 64).bfloat16() for _ in (0, 1)], (torch.ones(64),) * 2
    weights[0][0, :32] = weights[1][0, :32] = 0
    packed, doubled = (fit_table(code, (factor * weights[0], factor * weights[1]), ones, 32) for factor in (1, 2))
    assert torch.equal(packed.words, doubled.words) and torch.equal(2 * packed.steps, doubled.steps)
    assert packed.steps[0, 0] == 0
    assert not any(code.decode(packed.words, position, packed.steps)[0, :32].any() for position in (0, 1))


@pytest.mark.parametrize("name", list(CODES))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_no_code_holds_is_an_error(name, value):
    weights = torch.ones(2, 32).bfloat16(), torch.ones(2, 32).bfloat16()
    weights[1][1, 5] = value
    seen = ProjectionInputs.unknown(32, "cpu")
    with pytest.raises(UnencodableWeight, match="NaN"):
        fit(
            weights,
            column_importance((seen, seen), LEAST_SQUARES),
            least_squares(name),
            32 if get_code(name).has_steps else None,
        )


@pytest.mark.parametrize("name", [*TABLE_CODES, "angle16"])
def test_more_bits_and_more_directions_lose_less(name):
    """Relative squared error on normal weights, with room for sampling noise."""
    torch.manual_seed(3)
    code, weights = get_code(name), tuple(torch.randn(64, 256).bfloat16() for _ in (0, 1))
    seen = ProjectionInputs.unknown(256, "cpu")
    packed = fit(
        weights, column_importance((seen, seen), LEAST_SQUARES), least_squares(name), 128 if code.has_steps else None
    )
    error = sum((code.decode(packed.words, p, packed.steps).float() - w).square().mean() for p, w in enumerate(weights))
    assert error / 2 < {"angle16": 0.014, "angle8": 0.0095, "angle6": 0.037, "mask6": 0.06}[name]


def test_importance_balances_the_experts_and_keeps_unseen_columns():
    many = ProjectionInputs(torch.tensor([8.0, 0.0]), 64)
    few = ProjectionInputs(torch.tensor([1.0, 0.0]), 1)
    first, second = column_importance((many, few), LEAST_SQUARES)
    assert first[0] / second[0] == pytest.approx(8, rel=1e-2)
    assert first[1] > 0 and second[1] > 0
    silent = ProjectionInputs(torch.zeros(2), 0)
    assert torch.equal(column_importance((silent, silent), LEAST_SQUARES)[0], torch.ones(2))


def test_an_expert_without_tokens_leaves_the_word_to_its_partner():
    """Its columns count as much as one token of the layer's mean energy."""
    torch.manual_seed(4)
    statistics = ExpertStatistics.zeros(2, 64, 32, torch.device("cpu"), moments=True)
    statistics.observe(0, [4096], 3 * torch.randn(4096, 64), torch.randn(4096, 32), torch.ones(4096))
    inputs = statistics.inputs(0, 0), statistics.inputs(1, 0, flat=True)
    assert inputs[1].tokens == 1
    torch.testing.assert_close(inputs[1].norms, torch.full((64,), 3.0), rtol=0.02, atol=0)
    assert torch.equal(inputs[1].moments, inputs[1].norms.square().diag())
    weights = torch.randn(32, 64).bfloat16(), torch.randn(32, 64).bfloat16()
    code = get_code("angle8")
    packed = fit(weights, column_importance(inputs, LEAST_SQUARES), PairRecipe(code="angle8"), 32)
    errors = [
        float((code.decode(packed.words, position, packed.steps).float() - weight.float()).square().mean())
        for position, weight in enumerate(weights)
    ]
    assert 2 * errors[0] < errors[1] < 0.5


@pytest.mark.parametrize("step", [float("nan"), float("inf"), -float("inf"), 131072.0, 3e38])
def test_no_step_is_stored_that_no_weight_needs(step):
    with pytest.raises(UnencodableWeight, match="a step is NaN, infinite or above 130560"):
        stored_steps(torch.tensor([[0.01, step]]))
    kept = torch.tensor([[0.0, 1e-39, 130560.0]])
    assert torch.equal(stored_steps(kept), kept.bfloat16())
