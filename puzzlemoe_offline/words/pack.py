"""The words of two matrices, block by block, and what they lose."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.statistics import ProjectionInputs
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.relative_error import relative_error
from puzzlemoe_offline.words.compensate import fit_compensated
from puzzlemoe_offline.words.nearest import PackedMatrix, column_importance, fit
from puzzlemoe_vllm.format.codes import UnencodableWeight, get_code
from puzzlemoe_vllm.format.codes.trellis import TILE_ROWS

ENTRIES = {"cpu": 1 << 20, "cuda": 1 << 23}
"""Entries merged at a time: bounds the float32 scratch memory, lets it stay in a CPU's cache, and keeps a GPU busy."""


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


def pack_matrix(
    weights: tuple[Tensor, Tensor],
    inputs: tuple[ProjectionInputs, ProjectionInputs],
    recipe: PairRecipe,
    group: int | None,
    losses: Losses,
    index: int,
    importance_of_rows: Tensor | None = None,
) -> PackedMatrix:
    """Two matrices [N, K] as words, on their device; what they lose is added to `losses`.

    importance_of_rows: as in `fit_compensated`.

    Raises UnencodableWeight for weights that the code cannot hold, MomentsError where compensation cannot be.
    """
    code = get_code(recipe.code)
    rows = rows_at_once(weights[0])
    blocks = list(zip(weights[0].split(rows), weights[1].split(rows), strict=True))
    if recipe.compensate and inputs[0].moments is not None:
        packed = fit_compensated(code, weights, inputs, group, importance_of_rows)
    else:
        importance = column_importance(inputs, recipe)
        packed = PackedMatrix.stack([fit(block, importance, recipe, group) for block in blocks])
    steps = [None] * len(blocks) if packed.steps is None else packed.steps.split(rows)
    # Squares of the smallest and largest weights fit only into float64.
    sums = torch.zeros(2, 2, dtype=torch.float64, device=weights[0].device)
    stored_rows, _ = code.words_shape(rows, weights[0].shape[1])
    for block, words, step in zip(blocks, packed.words.split(stored_rows), steps, strict=True):
        for position, weight in enumerate(block):
            exact = weight.double()
            sums[0, position] += (exact - code.decode(words, position, step)).square().sum()
            sums[1, position] += exact.square().sum()
    found = sums.cpu()
    if not bool(found.isfinite().all()):
        raise UnencodableWeight("the words of these weights decode to NaN or infinity")
    losses.error[:, index] += found[0]
    losses.energy[:, index] += found[1]
    losses.clamped += packed.clamped
    return packed
