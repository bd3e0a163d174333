"""The words of pairs of experts and of their matrices, block by block, and what they lose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.routed_tokens import RoutedTokens
from puzzlemoe_offline.calibration.statistics import ExpertStatistics, ProjectionInputs, projection_inputs
from puzzlemoe_offline.model.expert import PROJECTIONS, Expert
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.relative_error import relative_error
from puzzlemoe_offline.words.compensate import fit_compensated
from puzzlemoe_offline.words.down_target import CORRECTION_DAMPING, DownInputs
from puzzlemoe_offline.words.factors import DAMPING, MomentsError, inverse_factors
from puzzlemoe_offline.words.nearest import PackedMatrix, column_importance, fit
from puzzlemoe_offline.words.neurons import face
from puzzlemoe_vllm.format.codes import PairCode, TrellisCode, UnencodableWeight, get_code
from puzzlemoe_vllm.format.codes.trellis import TILE_ROWS

ENTRIES = {"cpu": 1 << 20, "cuda": 1 << 23}
"""Entries merged at a time: bounds the float32 scratch memory, lets it stay in a CPU's cache, and keeps a GPU busy."""

TOGETHER = 1 << 27
"""Entries of matrices, and of the factors of their inputs, of pairs that a GPU codes side by side."""


T = TypeVar("T")

PackedPair = tuple[PackedMatrix, PackedMatrix, PackedMatrix]
"""A pair's gate, up and down projection."""


@dataclass
class Losses:
    """What packing a pair lost: squared error and energy, float64 [2, 3] by position and projection (gate, up, down),
    and entries clamped to the code's smallest magnitude or to zero."""

    error: Tensor = field(default_factory=lambda: torch.zeros(2, 3, dtype=torch.float64))
    energy: Tensor = field(default_factory=lambda: torch.zeros(2, 3, dtype=torch.float64))
    clamped: int = 0

    def relative(self, position: int) -> list[float | None]:
        """||W - W'|| / ||W|| of one expert, per projection."""
        error, energy = self.error[position].tolist(), self.energy[position].tolist()
        return [relative_error(*both) for both in zip(error, energy, strict=True)]


def rows_at_once(weight: Tensor) -> int:
    """Rows of a matrix [N, K] that `ENTRIES` allows, whole tiles of them."""
    return max(1, ENTRIES[weight.device.type] // weight.shape[1] // TILE_ROWS) * TILE_ROWS


def pack_matrices(
    weights: list[tuple[Tensor, Tensor]],
    inputs: list[tuple[ProjectionInputs, ProjectionInputs]],
    factors: Tensor | None,
    recipe: PairRecipe,
    group: int | None,
    losses: list[Losses],
    index: int,
    importance_of_rows: Tensor | None = None,
    targets: list[tuple[Tensor, Tensor]] | None = None,
) -> list[PackedMatrix]:
    """Pairs of matrices [N, K] as words, on their device; what each pair loses is added to its `losses`.

    factors: `inverse_factors` of the inputs, pair by pair; None without compensation.  importance_of_rows: as in
    `fit_compensated`.  targets: what the words are to stand for with compensation, if not the matrices.  Several pairs
    only where `pairs_at_once` allows them.
    Raises UnencodableWeight for weights that the code cannot hold.
    """
    code = get_code(recipe.code)
    rows = rows_at_once(weights[0][0])
    if factors is not None:
        packed = fit_compensated(code, targets or weights, factors, group, importance_of_rows)
    else:
        packed = []
        for pair, seen in zip(weights, inputs, strict=True):
            importance = column_importance(seen, recipe)
            blocks = zip(pair[0].split(rows), pair[1].split(rows), strict=True)
            packed.append(PackedMatrix.stack([fit(block, importance, recipe, group) for block in blocks]))
    sums = [_error_and_energy(code, pair, words, rows) for pair, words in zip(weights, packed, strict=True)]
    found = torch.stack(sums).cpu()
    if not bool(found.isfinite().all()):
        raise UnencodableWeight("the words of these weights decode to NaN or infinity")
    for its_losses, its_sums, its_words in zip(losses, found, packed, strict=True):
        its_losses.error[:, index] += its_sums[0]
        its_losses.energy[:, index] += its_sums[1]
        its_losses.clamped += its_words.clamped
    return packed


def _error_and_energy(code: PairCode, pair: tuple[Tensor, Tensor], packed: PackedMatrix, rows: int) -> Tensor:
    """Squares of what a pair lost and of what it was, float64 [2, 2], by position; so many rows at once."""
    # Squares of the smallest and largest weights fit only into float64.
    sums = torch.zeros(2, 2, dtype=torch.float64, device=pair[0].device)
    stored_rows, _ = code.words_shape(rows, pair[0].shape[1])
    blocks = zip(pair[0].split(rows), pair[1].split(rows), strict=True)
    every = packed.words.split(stored_rows)
    steps = [None] * len(every) if packed.steps is None else packed.steps.split(rows)
    for block, words, step in zip(blocks, every, steps, strict=True):
        for position, weight in enumerate(block):
            exact = weight.double()
            sums[0, position] += (exact - code.decode(words, position, step)).square().sum()
            sums[1, position] += exact.square().sum()
    return sums


def pack_pairs(
    experts: list[tuple[Expert, Expert]],
    ids: list[tuple[int, int]],
    statistics: ExpertStatistics | None,
    tokens: RoutedTokens | None,
    recipe: PairRecipe,
    group: int | None,
    losses: list[Losses],
) -> list[PackedPair]:
    """Pairs of experts as words, on their device; gate, up and down are merged separately, each with its own input's
    norms.

    ids: the experts' ids in `statistics`; None there means magnitude saliency.  tokens: of a recipe that corrects down
    projections.  group: columns that share a step, for codes that have steps.  Several pairs only where `pairs_at_once`
    allows them.
    Raises UnencodableWeight or MomentsError naming the experts, if it is one pair, and the projection.
    """
    facing = None
    if isinstance(get_code(recipe.code), TrellisCode):
        facing = [face(pair, its_ids, statistics) for pair, its_ids in zip(experts, ids, strict=True)]
        experts = [(first.expert, second.expert) for first, second in facing]
    packed: list[list[PackedMatrix]] = []
    factors = targets = None
    for index, projection in enumerate(PROJECTIONS):
        weights = [(first.matrices[index], second.matrices[index]) for first, second in experts]
        rows = None
        if facing:
            inputs = [(first.inputs[index], second.inputs[index]) for first, second in facing]
            rows = torch.stack([torch.stack([one.rows[index] for one in pair], dim=1) for pair in facing])
        else:
            columns, device = weights[0][0].shape[1], weights[0][0].device
            seen = [[projection_inputs(statistics, expert, index, columns, device) for expert in pair] for pair in ids]
            inputs = [(first, second) for first, second in seen]
        try:
            down: list[DownInputs] = []
            if tokens and projection == "down":
                down = _down_inputs(experts, ids, inputs, tokens, packed, get_code(recipe.code))
                inputs = _by_pair([its.seen for its in down])
            # Up sees what gate does.
            if recipe.compensate and projection != "up" and inputs[0][0].moments is not None:
                flat = [one for pair in inputs for one in pair]
                factors = inverse_factors(flat, CORRECTION_DAMPING if down else DAMPING)
            if down:
                assert factors is not None
                matrices = [matrix for pair in weights for matrix in pair]
                targets = _by_pair([its.target(*both) for its, *both in zip(down, matrices, factors, strict=True)])
            packed.append(pack_matrices(weights, inputs, factors, recipe, group, losses, index, rows, targets))
        except (UnencodableWeight, MomentsError) as error:
            raise type(error)(f"experts {ids[0][0]} and {ids[0][1]}, {projection} projection: {error}") from None
    return list(zip(*packed, strict=True))


def _by_pair(values: list[T]) -> list[tuple[T, T]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _down_inputs(
    experts: list[tuple[Expert, Expert]],
    ids: list[tuple[int, int]],
    inputs: list[tuple[ProjectionInputs, ProjectionInputs]],
    tokens: RoutedTokens,
    packed: list[list[PackedMatrix]],
    code: PairCode,
) -> list[DownInputs]:
    """What the down projections of pairs see of packed gate and up projections, pair by pair; inputs: of the exact
    ones."""
    found = []
    for place, (pair, its_ids, its_inputs) in enumerate(zip(experts, ids, inputs, strict=True)):
        for position, (exact, number, source) in enumerate(zip(pair, its_ids, its_inputs, strict=True)):
            gate, up = (code.decode(its[place].words, position, its[place].steps) for its in packed)
            found.append(DownInputs.of(exact, Expert(gate, up, exact.down), number, tokens, source))
    return found


def pairs_at_once(code: PairCode, columns: int, rows: int, device: torch.device) -> int:
    """How many pairs of matrices [rows, columns] `pack_matrices` takes at once."""
    if device.type == "cpu" or not code.has_steps:
        return 1
    return max(1, TOGETHER // (2 * columns * max(rows, columns)))
