"""One layer's experts: pair them, merge them, pack them, and measure what was lost."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.statistics import FEW_TOKENS, ExpertStatistics, ProjectionInputs
from puzzlemoe_offline.model.expert import PROJECTIONS, Expert
from puzzlemoe_offline.pairing.partners import LayerPairing
from puzzlemoe_offline.recipe import Recipe
from puzzlemoe_offline.words.compensate import fit_compensated
from puzzlemoe_offline.words.nearest import PackedMatrix, column_importance, fit
from puzzlemoe_vllm.format.codes import PairCode, UnencodableWeight, get_code

ENTRIES = {"cpu": 1 << 20, "cuda": 1 << 23}
"""Entries merged at a time: bounds the float32 scratch memory, lets it stay in a CPU's cache, and keeps a GPU busy."""


@dataclass
class Losses:
    """What packing lost: squared error and energy per projection (gate, up, down), and entries clamped to the code's
    smallest magnitude or to zero."""

    error: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    energy: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    clamped: int = 0

    def relative(self) -> list[float]:
        """||W - W'|| / ||W|| of the merged experts, per projection."""
        return [
            (error / energy) ** 0.5 if energy else 0.0 for error, energy in zip(self.error, self.energy, strict=True)
        ]


def projection_inputs(
    statistics: ExpertStatistics | None, expert: int, index: int, columns: int, device: torch.device
) -> ProjectionInputs:
    """What an expert's gate (0), up (1) or down (2) projection saw; columns that count the same without statistics, and
    for an expert that saw few tokens."""
    if statistics is None:
        return ProjectionInputs.unknown(columns, device)
    return statistics.inputs(expert, index, flat=int(statistics.tokens[expert]) < FEW_TOKENS)


PackedPair = tuple[PackedMatrix, PackedMatrix, PackedMatrix]
"""A pair's gate, up and down projection."""


def pack_pair(
    experts: tuple[Expert, Expert],
    ids: tuple[int, int],
    statistics: ExpertStatistics | None,
    recipe: Recipe,
    group: int | None,
    losses: Losses,
) -> PackedPair:
    """Two experts as words, on their device; gate, up and down are merged separately, each with its own input's norms.

    ids: the experts' ids in `statistics`; None there means magnitude saliency.  group: columns that share a step, for
    codes that have steps.
    Raises UnencodableWeight naming the experts and the projection.
    """
    packed = []
    for index, projection in enumerate(PROJECTIONS):
        weights = getattr(experts[0], projection), getattr(experts[1], projection)
        columns, device = weights[0].shape[1], weights[0].device
        first, second = (projection_inputs(statistics, expert, index, columns, device) for expert in ids)
        try:
            packed.append(pack_matrix(weights, (first, second), recipe, group, losses, index))
        except UnencodableWeight as error:
            raise UnencodableWeight(f"experts {ids[0]} and {ids[1]}, {projection} projection: {error}") from None
    return packed[0], packed[1], packed[2]


def rows_at_once(weight: Tensor) -> int:
    """Rows of a matrix [N, K] that `ENTRIES` allows."""
    return max(1, ENTRIES[weight.device.type] // weight.shape[1])


def pack_matrix(
    weights: tuple[Tensor, Tensor],
    inputs: tuple[ProjectionInputs, ProjectionInputs],
    recipe: Recipe,
    group: int | None,
    losses: Losses,
    index: int,
) -> PackedMatrix:
    """Two matrices [N, K] as words, on their device; what they lose is added to `losses`."""
    code = get_code(recipe.code)
    rows = rows_at_once(weights[0])
    blocks = list(zip(weights[0].split(rows), weights[1].split(rows), strict=True))
    if recipe.compensate and inputs[0].moments is not None:
        packed = fit_compensated(code, weights, inputs, group)
    else:
        importance = column_importance(inputs, recipe)
        packed = PackedMatrix.stack([fit(block, importance, recipe, group) for block in blocks])
    steps = [None] * len(blocks) if packed.steps is None else packed.steps.split(rows)
    error, energy = torch.zeros(2, dtype=torch.float64, device=weights[0].device)
    for block, words, block_steps in zip(blocks, packed.words.split(rows), steps, strict=True):
        for position, weight in enumerate(block):
            exact = weight.float()
            error += (exact - code.decode(words, position, block_steps).float()).square().sum()
            energy += exact.square().sum()
    losses.error[index] += float(error)
    losses.energy[index] += float(energy)
    losses.clamped += packed.clamped
    return packed


@dataclass(frozen=True)
class PackedLayer:
    """A layer after merging, under the new expert ids of `pairing`."""

    pairing: LayerPairing
    pairs: list[PackedPair]
    dense: list[Expert]
    code: PairCode

    def expert(self, source_id: int) -> Expert:
        """The reconstructed bf16 weights of the expert that the source calls `source_id`."""
        new = self.pairing.order.index(source_id)
        if new >= self.pairing.merged:
            return self.dense[new - self.pairing.merged]
        return Expert(*(self.code.decode(matrix.words, new & 1, matrix.steps) for matrix in self.pairs[new >> 1]))
