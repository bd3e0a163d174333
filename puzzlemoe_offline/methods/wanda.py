"""Wanda (arXiv 2306.11695) with 2:4 sparsity: of four neighbouring weights of a row the two most salient stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.passes import LayerPasses
from puzzlemoe_offline.calibration.statistics import ExpertStatistics
from puzzlemoe_offline.methods.base import LayerMethod, MethodError, NewLayer, dense_layer, expert_statistics
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_offline.model.layer_experts import SourceLayer

BITS = (2 * 16 + 2 * 2) / 4
"""Of four weights two are stored as bf16, each with two bits that say which of the four it is."""


def prune(weight: Tensor, norms: Tensor) -> Tensor:
    """A matrix [N, K] with two of every four columns' weights set to zero; norms [K], of the input columns."""
    salient = (weight.float().abs() * norms).unflatten(1, (-1, 4))
    kept = torch.zeros_like(salient, dtype=torch.bool).scatter_(-1, salient.topk(2, dim=-1).indices, True)
    return weight * kept.flatten(1)


@dataclass(frozen=True)
class Wanda(LayerMethod):
    """2:4 sparsity on all routed experts.  An expert without tokens is pruned by magnitude."""

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises MethodError when the experts' sizes are not multiples of four."""
        super().check(checkpoint)
        for key, size in zip(("hidden_size", checkpoint.family.intermediate), checkpoint.expert_sizes, strict=True):
            if size % 4:
                raise MethodError(
                    f"{checkpoint.folder}: {key} is {size}, not a multiple of four, which wanda-2:4 needs"
                )

    def bits_per_weight(self, checkpoint: Checkpoint) -> float:
        """As the sparse matrix units of GPUs store them."""
        return BITS

    def observe(self, layer: SourceLayer, passes: LayerPasses) -> ExpertStatistics:
        """Norms of every expert's input columns."""
        return expert_statistics(layer, passes)

    def merge(self, layer: SourceLayer, seen: ExpertStatistics) -> NewLayer:
        """Every expert, pruned."""
        pruned = []
        for number, expert in enumerate(layer.experts):
            few = int(seen.tokens[number]) == 0
            norms = [seen.inputs(number, projection, flat=few).norms for projection in range(3)]
            pruned.append(Expert(*(prune(weight, norm) for weight, norm in zip(expert.matrices, norms, strict=True))))
        return dense_layer(layer, pruned)
