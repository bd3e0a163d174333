"""GPTQ (arXiv 2210.17323): rounding column by column, the error of each pushed into the columns still to come.

Columns keep their order, and every expert has the second moments of its own tokens.  Inputs are those of the dense
model, from the calibration pass that compression uses too.  So is the damping, `factors.DAMPING`: GPTQ's usual
hundredth trusts the few thousand tokens of an expert too much.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.passes import LayerPasses
from puzzlemoe_offline.calibration.statistics import FEW_TOKENS, ExpertStatistics, ProjectionInputs
from puzzlemoe_offline.methods.base import LayerMethod, NewLayer, dense_layer, expert_statistics
from puzzlemoe_offline.methods.rounding import Grid, group_of, stored_bits
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_offline.model.layer_experts import SourceLayer
from puzzlemoe_offline.words.column_coders import BLOCK
from puzzlemoe_offline.words.factors import inverse_factors


def gptq(weight: Tensor, inputs: ProjectionInputs, bits: int) -> Tensor:
    """A matrix [N, K] on integer grids, bf16; `inputs` must have moments."""
    factor, group = inverse_factors([inputs])[0], group_of(weight.shape[1])
    # Columns are the outer dimension from here on, so that each is contiguous.
    left = weight.float().T.contiguous()
    result = torch.empty_like(left)
    for start in range(0, len(left), BLOCK):
        block, inner = left[start : start + BLOCK].clone(), factor[start : start + BLOCK, start : start + BLOCK]
        errors = torch.empty_like(block)
        for column in range(len(block)):
            if column % group == 0:
                grid = Grid.of(block[column : column + group].T, bits)
            rounded = grid.nearest(block[column, :, None])[:, 0]
            result[start + column] = rounded
            errors[column] = (block[column] - rounded) / inner[column, column]
            block[column + 1 :] -= inner[column, column + 1 :, None] * errors[column]
        left[start + BLOCK :] -= factor[start : start + BLOCK, start + BLOCK :].T @ errors
    return result.T.to(torch.bfloat16)


@dataclass(frozen=True)
class Gptq(LayerMethod):
    """Integer grids with GPTQ's compensation."""

    bits: int

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises MethodError when no group size divides the experts' sizes."""
        super().check(checkpoint)
        stored_bits(self.bits, checkpoint)

    def bits_per_weight(self, checkpoint: Checkpoint) -> float:
        """Bits, and a scale and a zero point per group."""
        return stored_bits(self.bits, checkpoint)

    def observe(self, layer: SourceLayer, passes: LayerPasses) -> ExpertStatistics:
        """Second moments of every expert's own tokens."""
        return expert_statistics(layer, passes, moments=True)

    def merge(self, layer: SourceLayer, seen: ExpertStatistics) -> NewLayer:
        """Every expert, rounded; without compensation where it saw fewer than `FEW_TOKENS` tokens."""
        rounded = []
        for number, expert in enumerate(layer.experts):
            few = int(seen.tokens[number]) < FEW_TOKENS
            rounded.append(
                Expert(
                    *(
                        gptq(weight, seen.inputs(number, projection, flat=few), self.bits)
                        for projection, weight in enumerate(expert.matrices)
                    )
                )
            )
        return dense_layer(layer, rounded)
