"""Merging two experts' weight matrices entry by entry with the least squared error that the paper's word allows."""

from __future__ import annotations

import torch
from torch import Tensor

from puzzlemoe_offline.words.merged_pair import MergedPair, state_of


def merge_least_squares(weight0: Tensor, weight1: Tensor, importance0: Tensor, importance1: Tensor) -> MergedPair:
    """The merged form with the least squared error, in place of the paper's threshold and saliency.

    weight0, weight1: [N, K]; importance0, importance1: positive [K], weights of each expert's squared errors.
    An entry's state is the cheapest of: both share the weighted mean, or one keeps its weight and the other is masked.
    """
    value0, value1 = weight0.float(), weight1.float()
    magnitude0, magnitude1 = value0.abs(), value1.abs()
    total = importance0 + importance1
    shared = importance0 * importance1 / total * (magnitude0 - magnitude1).square()
    lose0, lose1 = importance0 * magnitude0.square(), importance1 * magnitude1.square()
    both = shared <= torch.minimum(lose0, lose1)
    first = lose0 >= lose1
    mean = (importance0 * magnitude0 + importance1 * magnitude1) / total
    return MergedPair(
        state=state_of(both, first),
        negative=(torch.signbit(value0), torch.signbit(value1)),
        magnitude=torch.where(both, mean, torch.where(first, magnitude0, magnitude1)),
    )
