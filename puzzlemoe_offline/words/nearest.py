"""The nearest words to a pair of matrices, by squared error weighted with each expert's input norms.

Where no input correlates with another, the squared error of a projection's output is the sum over its weights of
(error * norm of the input column)^2; the fits here minimise that sum, balanced between the two experts, over what a
code can hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.statistics import FEW_TOKENS, ProjectionInputs
from puzzlemoe_offline.finite import all_finite
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.words.least_squares import merge_least_squares
from puzzlemoe_offline.words.merged_pair import MergedPair
from puzzlemoe_offline.words.paper_rule import merge_pair
from puzzlemoe_offline.words.trellis import encode
from puzzlemoe_vllm.format.codes import PairCode, TableCode, TrellisCode, UnencodableWeight, get_code
from puzzlemoe_vllm.format.codes.angle16 import Angle16
from puzzlemoe_vllm.format.codes.base import LARGEST
from puzzlemoe_vllm.format.codes.mask16 import SMALLEST, Mask16
from puzzlemoe_vllm.format.codes.trellis import places_of, values

UNSEEN = 1e-4
"""Importance, relative to the mean, of an input column that no calibration token touched."""

BALANCE = 0.5
"""Each expert's squares are divided by its token count to this power.  The sum over all calibration tokens, power 0,
gives up too much of the rarer expert of a pair; the mean per token, power 1, too much of the other."""

LEFT = 0.4
"""Squared error, relative to its weights, that shared bits leave the lighter expert of a pair at most, by theory: the
busiest expert may stand beside one that hardly a token chose, which must not be lost (`LOST`) for that.  Uneven rows
and columns make it twice as much: with a half, such an expert of a small model was lost at two bits."""

STEP_MULTIPLES = (0.85, 0.95, 1.05, 1.15)
"""A group's step is the best of these multiples of the best step for normally distributed weights, then fitted to the
words that it gave.  Trying more multiples lowers the error more than fitting words and step by turns does."""

MOST_TARGET = 2.0**14
"""Weights over their step, which are near a trellis's values, that squares and their sums can hold whatever their
importance is."""

SCORES = 1 << 20
"""Floats of scores of candidate words in memory at once: the cache of a CPU.  A GPU's kernel keeps none."""


@dataclass(frozen=True)
class PackedMatrix:
    """Stored words of a pair of matrices [N, K], bf16 steps [N, groups] where the code has them, and
    how many entries were clamped to the code's smallest magnitude or to zero."""

    words: Tensor
    steps: Tensor | None = None
    clamped: int = 0

    def split(self, count: int) -> list[PackedMatrix]:
        """So many matrices of equal size that lie below each other in this one."""
        if count == 1:
            return [self]
        assert not self.clamped, "of which matrix is not known"
        steps = [None] * count if self.steps is None else self.steps.chunk(count)
        return [PackedMatrix(*both) for both in zip(self.words.chunk(count), steps, strict=True)]

    @staticmethod
    def stack(blocks: list[PackedMatrix]) -> PackedMatrix:
        """Blocks of rows as one."""
        steps = [block.steps for block in blocks if block.steps is not None]
        return PackedMatrix(
            torch.cat([block.words for block in blocks]),
            torch.cat(steps) if steps else None,
            sum(block.clamped for block in blocks),
        )


def own_importance(seen: ProjectionInputs, recipe: PairRecipe) -> Tensor:
    """How much an expert's input columns count by themselves, float32 [K]: norms for the paper's rule, squares over a
    power of the token count otherwise."""
    return seen.norms if recipe.is_paper else seen.norms.square() / max(seen.tokens, 1) ** BALANCE


def pair_importance(own: tuple[Tensor, Tensor], few: Tensor, recipe: PairRecipe) -> tuple[Tensor, Tensor]:
    """How much the columns of two experts count in their pair, float32 [..., K] twice.

    own: as `own_importance` gives them, [..., K]; few: bool [..., 1], whether one of the two saw few tokens, so that
    the paper's rule goes by magnitude alone.  Other fits take weights of the squared errors, relative to the pair's
    mean.
    """
    if recipe.is_paper:
        return own[0].masked_fill(few, 1), own[1].masked_fill(few, 1)
    mean = (own[0].mean(dim=-1, keepdim=True) + own[1].mean(dim=-1, keepdim=True)) / 2
    silent = mean == 0
    return (own[0] / mean + UNSEEN).masked_fill(silent, 1), (own[1] / mean + UNSEEN).masked_fill(silent, 1)


def bounded_importance(
    code: TrellisCode, importance: tuple[Tensor, Tensor], squares: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Importance of two experts, [..., K] each; the heavier one's is lowered to what leaves the other its bits
    (`LEFT`), but not below the other's.  squares: mean squares of their weights, [..., 1] each.

    Where words share their bits, an expert's squared error is the root of its partner's importance over its own, times
    the squared step, over 2^bits; and the step suits the weights of the heavier one.
    """
    first, second = (each.mean(dim=-1, keepdim=True) for each in importance)
    step = (first * squares[0] + second * squares[1]) / (first + second)
    step = step.clamp(min=torch.finfo(torch.float32).tiny)  # of two experts of zeros
    most0, most1 = ((LEFT * 2**code.bits * (its / step).clamp(max=1)).square().clamp(min=1) for its in squares)
    return (
        importance[0] * (most1 * second / first).clamp(max=1),
        importance[1] * (most0 * first / second).clamp(max=1),
    )


def column_importance(inputs: tuple[ProjectionInputs, ProjectionInputs], recipe: PairRecipe) -> tuple[Tensor, Tensor]:
    """The same of one pair, float32 [K] twice."""
    few = torch.tensor([any(seen.tokens < FEW_TOKENS for seen in inputs)], device=inputs[0].norms.device)
    return pair_importance((own_importance(inputs[0], recipe), own_importance(inputs[1], recipe)), few, recipe)


def fit(
    weights: tuple[Tensor, Tensor], importance: tuple[Tensor, Tensor], recipe: PairRecipe, group: int | None
) -> PackedMatrix:
    """The words of two matrices [N, K] by the recipe's code and rule.

    importance: as `column_importance` gives it.  No column's words depend on other columns, but for those of its group.
    Raises UnencodableWeight for a weight that the recipe's code cannot hold.
    """
    code = get_code(recipe.code)
    if recipe.tau is not None:
        assert isinstance(code, Mask16)
        return pack_merged(code, merge_pair(*weights, *importance, recipe.tau))
    return fit_least_squares(code, weights, importance, group)


def fit_least_squares(
    code: PairCode, weights: tuple[Tensor, Tensor], importance: tuple[Tensor, Tensor], group: int | None
) -> PackedMatrix:
    """The words of two matrices [N, K] with the least weighted squared error; importance: float32 [K] twice."""
    return FITS[type(code)](code, weights, importance, group)


def pack_merged(code: Mask16, pair: MergedPair) -> PackedMatrix:
    """A merged pair as mask16 words."""
    clamped = (pair.magnitude > 0) & (pair.magnitude < SMALLEST)
    return PackedMatrix(code.encode(pair.state, pair.negative, pair.magnitude), clamped=int(clamped.sum()))


def fit_mask16(
    code: Mask16, weights: tuple[Tensor, Tensor], importance: tuple[Tensor, Tensor], group: int | None
) -> PackedMatrix:
    """As `merge_least_squares` merges; no group."""
    return pack_merged(code, merge_least_squares(*weights, *importance))


def check_finite(weights: tuple[Tensor, ...]) -> None:
    """Raises UnencodableWeight for a weight that no word holds."""
    if not all(map(all_finite, weights)):
        raise UnencodableWeight("a weight is NaN or infinite")


def fit_angle16(
    code: Angle16, weights: tuple[Tensor, Tensor], importance: tuple[Tensor, Tensor], group: int | None
) -> PackedMatrix:
    """For each direction the magnitude is the weighted projection onto it, and the direction with the least error wins,
    which is the one with the most energy in its projection; no group."""
    check_finite(weights)
    value0, value1 = (weight.float().abs() for weight in weights)
    best, magnitude = torch.full_like(value0, -1), torch.zeros_like(value0)
    direction = torch.zeros_like(value0, dtype=torch.uint8)
    for d, (multiplier0, multiplier1) in enumerate(zip(code.multipliers(0), code.multipliers(1), strict=True)):
        product = importance[0] * multiplier0 * value0 + importance[1] * multiplier1 * value1
        along = product / (importance[0] * multiplier0**2 + importance[1] * multiplier1**2)
        better = product * along > best
        best = torch.where(better, product * along, best)
        magnitude = torch.where(better, along, magnitude)
        direction.masked_fill_(better, d)
    return PackedMatrix(code.encode(direction, (torch.signbit(weights[0]), torch.signbit(weights[1])), magnitude))


def fit_table(
    code: TableCode, weights: tuple[Tensor, Tensor], importance: tuple[Tensor, Tensor], group: int | None
) -> PackedMatrix:
    """Words and steps of a code with steps, for groups of `group` columns.

    Of the steps of `STEP_MULTIPLES` the one with the least error stays, and is replaced by the least-squares step of
    the words that it gave.
    """
    assert group is not None
    check_finite(weights)
    if weights[0].is_cuda:
        from puzzlemoe_offline.words.nearest_kernels import fit_groups

        fitted, steps = fit_groups(code, weights, importance, group, STEP_MULTIPLES)
        return PackedMatrix(code.pack(fitted), stored_steps(steps))
    pair = torch.stack([weight.float().abs().unflatten(1, (-1, group)) for weight in weights])
    by_group = torch.stack(importance)[:, None].unflatten(2, (-1, group))
    magnitudes = code.magnitudes.to(pair.device)
    energy = (by_group * pair.square()).sum(dim=(0, 3))
    typical = (energy / by_group.sum(dim=(0, 3))).sqrt() * code.unit_step
    least = torch.full_like(typical, torch.inf)
    index = torch.zeros(pair.shape[1:], dtype=torch.uint8, device=pair.device)
    for multiple in STEP_MULTIPLES:
        step = typical * multiple
        tried, score = nearest(magnitudes, pair, step, by_group)
        error = energy + 2 * step.square() * score.sum(dim=2)
        better = error < least
        least = torch.where(better, error, least)
        index = torch.where(better[..., None], tried, index)
    index = index.int()
    product, square = torch.zeros_like(energy), torch.zeros_like(energy)
    for position in (0, 1):
        value = magnitudes[:, position][index]
        weighted = by_group[position] * value
        product += (weighted * pair[position]).sum(dim=2)
        square += (weighted * value).sum(dim=2)
    words = code.encode(index.flatten(1), (torch.signbit(weights[0]), torch.signbit(weights[1])))
    return PackedMatrix(words, stored_steps(product / square))


def fit_trellis(
    code: TrellisCode, weights: tuple[Tensor, Tensor], importance: tuple[Tensor, Tensor], group: int | None
) -> PackedMatrix:
    """Words of a trellis, and steps for groups of `group` columns: those that suit normal weights, replaced by the
    least-squares steps of the words that they gave."""
    assert group is not None
    check_finite(weights)
    pair = torch.stack([weight.float() for weight in weights], dim=-1)
    squares = pair.square().mean(dim=(0, 1))
    by_column = torch.stack(bounded_importance(code, importance, (squares[:1], squares[1:])), dim=-1).float()
    step = typical_steps(pair, by_column, group) * code.unit_step
    words = encode_matrix(code, pair, by_column, stored_steps(step))
    product, square = torch.zeros_like(step), torch.zeros_like(step)
    for position, value in enumerate(values(code.states(words))):
        weighted = by_column[:, position] * value
        product += (weighted * pair[..., position]).unflatten(1, (-1, group)).sum(dim=2)
        square += (weighted * value).unflatten(1, (-1, group)).sum(dim=2)
    return PackedMatrix(words, stored_steps((product / square).where(square > 0, step)))


def typical_steps(pair: Tensor, importance: Tensor, group: int) -> Tensor:
    """The root of the weighted mean square of weights [N, K, 2] in each row's groups, float32 [N, groups]; importance:
    [K, 2] or [N, K, 2]."""
    energy = (pair.square() * importance).unflatten(1, (-1, group)).sum(dim=(2, 3))
    total = importance.expand_as(pair).unflatten(1, (-1, group)).sum(dim=(2, 3))
    typical: Tensor = (energy / total).sqrt()
    return typical


def encode_matrix(code: TrellisCode, pair: Tensor, importance: Tensor, steps: Tensor) -> Tensor:
    """Stored words of weights float32 [N, K, 2] with the least squared error.

    importance: float32 [K, 2] or [N, K, 2], of the errors; steps: bf16 [N, groups].
    """
    step = steps.float().repeat_interleave(pair.shape[1] // steps.shape[1], dim=1)[..., None]
    tiny = torch.finfo(torch.float32).tiny
    targets = (pair / step.clamp(min=tiny)).clamp(-MOST_TARGET, MOST_TARGET)
    weights = importance * (step / step.amax().clamp(min=tiny)).square()
    rows, columns, _ = pair.shape
    tiles = [places_of(part.movedim(-1, 0)).movedim(0, -1).flatten(0, 1) for part in (targets, weights)]
    return encode(code, *tiles).view(code.words_shape(rows, columns))


def stored_steps(steps: Tensor) -> Tensor:
    """Steps in bf16, as they are stored.

    Raises UnencodableWeight for one that is NaN, infinite or above `LARGEST`: the squares of larger weights leave
    float32, in which steps are fitted.
    """
    stored = steps.to(torch.bfloat16)
    if not bool((stored.abs() <= LARGEST).all()):
        raise UnencodableWeight(f"a step is NaN, infinite or above {LARGEST:g}: no working model has such weights")
    return stored


FITS: dict[type[PairCode], Callable[..., PackedMatrix]] = {
    Mask16: fit_mask16,
    Angle16: fit_angle16,
    TableCode: fit_table,
    TrellisCode: fit_trellis,
}
"""The least-squares fit of every kind of code."""


def nearest(magnitudes: Tensor, pair: Tensor, step: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Index into `magnitudes` of the word with the least weighted error, uint8 [N, groups, group], and float32 scores:
    half that error over the squared step, less what does not depend on the word.

    magnitudes: [C, 2]; pair: absolute weights [2, N, groups, group]; step: [N, groups]; importance: [2, 1, groups,
    group].
    """
    # sum_p importance_p (v_p^2 / 2 - x_p v_p) of all candidates v is one matrix product.
    table = torch.cat([-magnitudes.T, magnitudes.T.square() / 2])
    scaled = pair / step.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    index = torch.empty(pair.shape[1:], dtype=torch.uint8, device=pair.device)
    score = torch.empty(pair.shape[1:], device=pair.device)
    rows = max(1, SCORES // (len(magnitudes) * pair[0, 0].numel()))
    for first in range(0, pair.shape[1], rows):
        block = scaled[:, first : first + rows]
        features = torch.cat([importance * block, importance.expand_as(block)]).flatten(1)
        least = (features.T @ table).min(dim=1)
        index[first : first + rows] = least.indices.view(block.shape[1:])
        score[first : first + rows] = least.values.view(block.shape[1:])
    return index, score
