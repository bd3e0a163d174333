"""The words of pairs of experts and of their matrices, block by block, and what they lose."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.routed_tokens import RoutedTokens
from puzzlemoe_offline.calibration.statistics import ExpertStatistics, ProjectionInputs
from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.relative_error import relative_error
from puzzlemoe_offline.words.compensate import fit_compensated
from puzzlemoe_offline.words.down_target import CORRECTION_DAMPING, DownInputs
from puzzlemoe_offline.words.factors import MomentsError, inverse_factors
from puzzlemoe_offline.words.nearest import PackedMatrix, column_importance, fit
from puzzlemoe_offline.words.neurons import OrderedExpert, as_it_stands, face
from puzzlemoe_vllm.format.codes import PairCode, TrellisCode, UnencodableWeight, get_code
from puzzlemoe_vllm.format.codes.trellis import TILE_ROWS

ENTRIES = {"cpu": 1 << 20, "cuda": 1 << 23}
"""Entries merged at a time: bounds the float32 scratch memory, lets it stay in a CPU's cache, and keeps a GPU busy."""

TOGETHER = 1 << 27
"""Entries of matrices, and of the factors of their inputs, of pairs that a GPU codes side by side."""


T = TypeVar("T")

PackedPair = tuple[PackedMatrix, PackedMatrix, PackedMatrix]
"""A pair's gate, up and down projection."""

_Packed = list[PackedMatrix]
"""One projection of all pairs."""

_Targets = list[tuple[Tensor, Tensor]] | None


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
    code = get_code(recipe.code)
    members = _members(experts, ids, statistics, code)

    def pack(index: int, inputs: list[ProjectionInputs], factors: Tensor | None, targets: _Targets = None) -> _Packed:
        weights = _by_pair([its.expert.matrices[index] for its in members])
        rows = None
        if members[0].rows:
            rows = torch.stack([torch.stack([its.rows[index] for its in pair], dim=1) for pair in _by_pair(members)])
        return pack_matrices(weights, _by_pair(inputs), factors, recipe, group, losses, index, rows, targets)

    def factors_of(inputs: list[ProjectionInputs]) -> Tensor | None:
        return inverse_factors(inputs) if recipe.compensate and inputs[0].moments is not None else None

    with _named(ids, "gate"):
        inputs = [its.inputs[0] for its in members]
        factors = factors_of(inputs)
        gate = pack(0, inputs, factors)
    with _named(ids, "up"):  # it sees what gate does
        up = pack(1, inputs, factors)
    with _named(ids, "down"):
        if tokens:
            down = pack(2, *_for_down(members, ids, tokens, (gate, up), code))
        else:
            inputs = [its.inputs[2] for its in members]
            down = pack(2, inputs, factors_of(inputs))
    return list(zip(gate, up, down, strict=True))


def _members(
    experts: list[tuple[Expert, Expert]],
    ids: list[tuple[int, int]],
    statistics: ExpertStatistics | None,
    code: PairCode,
) -> list[OrderedExpert]:
    """The experts of all pairs with what they see; those of a pair facing each other where its words share bits."""
    if isinstance(code, TrellisCode):
        return [its for pair, numbers in zip(experts, ids, strict=True) for its in face(pair, numbers, statistics)]
    return [
        as_it_stands(expert, number, statistics)
        for pair, numbers in zip(experts, ids, strict=True)
        for expert, number in zip(pair, numbers, strict=True)
    ]


def _for_down(
    members: list[OrderedExpert],
    ids: list[tuple[int, int]],
    tokens: RoutedTokens,
    packed: tuple[_Packed, _Packed],
    code: PairCode,
) -> tuple[list[ProjectionInputs], Tensor, _Targets]:
    """What the down projections see of packed gate and up projections, the factors of that, and what the words are to
    stand for."""
    found = []
    for place, (member, number) in enumerate(zip(members, itertools.chain(*ids), strict=True)):
        pair, position = divmod(place, 2)
        gate, up = (code.decode(its[pair].words, position, its[pair].steps) for its in packed)
        seen = Expert(gate, up, member.expert.down)
        found.append(DownInputs.of(member.expert, seen, number, tokens, member.inputs[2]))
    inputs = [its.seen for its in found]
    factors = inverse_factors(inputs, CORRECTION_DAMPING)
    exact = [member.expert.down for member in members]
    targets = [its.target(weight, factor) for its, weight, factor in zip(found, exact, factors, strict=True)]
    return inputs, factors, _by_pair(targets)


def _by_pair(values: list[T]) -> list[tuple[T, T]]:
    return list(zip(values[::2], values[1::2], strict=True))


@contextmanager
def _named(ids: list[tuple[int, int]], projection: str) -> Iterator[None]:
    """Names the experts, if it is one pair, and the projection in errors about weights and moments."""
    try:
        yield
    except (UnencodableWeight, MomentsError) as error:
        raise type(error)(f"experts {ids[0][0]} and {ids[0][1]}, {projection} projection: {error}") from None


def pairs_at_once(code: PairCode, columns: int, rows: int, device: torch.device) -> int:
    """How many pairs of matrices [rows, columns] `pack_matrices` takes at once."""
    if device.type == "cpu" or not code.has_steps:
        return 1
    return max(1, TOGETHER // (2 * columns * max(rows, columns)))
