"""Merging two experts' weight matrices entry by entry (PuzzleMoE, Section 3.1, Eq. 1-8)."""

from __future__ import annotations

import torch
from torch import Tensor

from puzzlemoe_offline.words.merged_pair import MergedPair, state_of


def similar(magnitude0: Tensor, magnitude1: Tensor, tau: float) -> Tensor:
    """Similarity mask (Eq. 1): ||Wi|-|Wj|| / (|Wi|+|Wj|) <= tau, as bool.

    magnitude0, magnitude1: float32 [N, K].  Equality counts as similar, and so does 0/0: two zeros share a zero.
    """
    total = magnitude0 + magnitude1
    ratio = (magnitude0 - magnitude1).abs() / total
    return (ratio <= tau) | (total == 0)


def keeps_first(magnitude0: Tensor, magnitude1: Tensor, norm0: Tensor, norm1: Tensor) -> Tensor:
    """Where position 0 is the more salient one (Wanda's |W| * ||X||_2 per input column), as bool [N, K].

    magnitude0, magnitude1: float32 [N, K]; norm0, norm1: float32 [K].  Equal saliency goes to the larger magnitude (a
    column that no calibration token touched has saliency 0 on both sides), then to position 0.
    """
    saliency0, saliency1 = magnitude0 * norm0, magnitude1 * norm1
    return (saliency0 > saliency1) | ((saliency0 == saliency1) & (magnitude0 >= magnitude1))


def merge_pair(weight0: Tensor, weight1: Tensor, norm0: Tensor, norm1: Tensor, tau: float) -> MergedPair:
    """The paper's merged magnitude, masks and signs of two matrices [N, K].

    norm0, norm1: [K], L2 norm of each input column over each expert's own calibration tokens; ones for magnitude
    saliency.
    Similar entries share the mean magnitude and keep both masks; of the others the more salient one keeps its weight.
    """
    value0, value1 = weight0.float(), weight1.float()
    magnitude0, magnitude1 = value0.abs(), value1.abs()
    both = similar(magnitude0, magnitude1, tau)
    first = keeps_first(magnitude0, magnitude1, norm0.float(), norm1.float())
    alone = torch.where(first, magnitude0, magnitude1)
    return MergedPair(
        state=state_of(both, first),
        negative=(torch.signbit(value0), torch.signbit(value1)),
        magnitude=torch.where(both, (magnitude0 + magnitude1) / 2, alone),
    )
