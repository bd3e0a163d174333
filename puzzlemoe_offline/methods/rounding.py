"""Rounding to the nearest point of a uniform grid, one grid per row and group of input columns.

The grids are asymmetric, from the least to the largest weight of the group and with zero on them, as GPTQ's and most
4-bit checkpoints are: a bf16 scale and a zero point of as many bits as a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puzzlemoe_offline.methods.base import LayerMethod, MethodError, NewLayer, dense_layer
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_offline.model.layer_experts import SourceLayer
from puzzlemoe_vllm.format.codes import GROUP_SIZES


@dataclass(frozen=True)
class Grid:
    """Points (0 .. 2^bits - 1 - zero) * scale; scale, of bf16 values, and zero: float32 [..., 1]."""

    bits: int
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, group: Tensor, bits: int) -> Grid:
        """The grid of each group of weights [..., columns]."""
        low, high = group.float().amin(-1, keepdim=True).clamp(max=0), group.float().amax(-1, keepdim=True).clamp(min=0)
        steps = 2**bits - 1
        scale = ((high - low) / steps).to(torch.bfloat16).float()
        scale = torch.where(scale > 0, scale, 1.0)
        return cls(bits, scale, (-low / scale).round().clamp(0, steps))

    def nearest(self, weight: Tensor) -> Tensor:
        """The nearest point to each weight [..., columns], float32."""
        level = (weight.float() / self.scale + self.zero).round().clamp(0, 2**self.bits - 1)
        return (level - self.zero) * self.scale


def group_of(columns: int) -> int:
    """Input columns that share a grid: 128, or 64 or 32 where those do not divide them.

    Raises MethodError when none does.
    """
    for size in GROUP_SIZES:
        if columns % size == 0:
            return size
    raise MethodError(
        f"an expert's projection has {columns} input columns, which groups of {', '.join(map(str, GROUP_SIZES))} do "
        "not divide: integer grids do not fit this model"
    )


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """Every weight of [N, K] on its group's grid, bf16."""
    groups = weight.unflatten(1, (-1, group_of(weight.shape[1])))
    return Grid.of(groups, bits).nearest(groups).flatten(1).to(torch.bfloat16)


def stored_bits(bits: int, checkpoint: Checkpoint) -> float:
    """Bits per weight of grids of `bits`, scale and zero point included.  Raises MethodError as `group_of` does."""
    hidden, intermediate = checkpoint.expert_sizes
    per_group = 16 + bits
    return bits + per_group * (2 / group_of(hidden) + 1 / group_of(intermediate)) / 3


@dataclass(frozen=True)
class RoundToNearest(LayerMethod):
    """Integer grids without calibration."""

    bits: int
    passes = 0

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises MethodError when no group size divides the experts' sizes."""
        super().check(checkpoint)
        stored_bits(self.bits, checkpoint)

    def bits_per_weight(self, checkpoint: Checkpoint) -> float:
        """Bits, and a scale and a zero point per group."""
        return stored_bits(self.bits, checkpoint)

    def merge(self, layer: SourceLayer, seen: None) -> NewLayer:
        """Every expert, rounded."""
        rounded = [
            Expert(*(round_to_nearest(weight, self.bits) for weight in expert.matrices)) for expert in layer.experts
        ]
        return dense_layer(layer, rounded)
