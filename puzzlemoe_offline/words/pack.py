"""The words of two matrices, block by block, and what they lose."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.statistics import ProjectionInputs
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.words.compensate import fit_compensated
from puzzlemoe_offline.words.nearest import PackedMatrix, column_importance, fit
from puzzlemoe_vllm.format.codes import get_code

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


def rows_at_once(weight: Tensor) -> int:
    """Rows of a matrix [N, K] that `ENTRIES` allows."""
    return max(1, ENTRIES[weight.device.type] // weight.shape[1])


def pack_matrix(
    weights: tuple[Tensor, Tensor],
    inputs: tuple[ProjectionInputs, ProjectionInputs],
    recipe: PairRecipe,
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
    for block, words, step in zip(blocks, packed.words.split(rows), steps, strict=True):
        for position, weight in enumerate(block):
            exact = weight.float()
            error += (exact - code.decode(words, position, step).float()).square().sum()
            energy += exact.square().sum()
    losses.error[index] += float(error)
    losses.energy[index] += float(energy)
    losses.clamped += packed.clamped
    return packed
