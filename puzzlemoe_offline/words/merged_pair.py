"""Two experts' weights as the paper merges them: what one magnitude, a state and two signs make of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puzzlemoe_vllm.format.codes.mask16 import BOTH, FIRST, SECOND


@dataclass(frozen=True)
class MergedPair:
    """The merged form of two weight matrices, before it becomes mask16 words; all tensors [N, K].

    state: uint8, `BOTH`, `FIRST` or `SECOND` of mask16: whose weight is the magnitude.
    negative: two bool tensors, True where that position's weight is below zero (paper: sign bits).
    magnitude: float32, shared by both positions (paper: W_merged).
    """

    state: Tensor
    negative: tuple[Tensor, Tensor]
    magnitude: Tensor

    def mask(self, position: int) -> Tensor:
        """True where that position keeps the magnitude (paper: M_i, M_j)."""
        return (self.state >> (1 - position)) & 1 == 0

    def weight(self, position: int) -> Tensor:
        """The float32 weights [N, K] of one position, before rounding to words."""
        signed = torch.where(self.negative[position], -self.magnitude, self.magnitude)
        return torch.where(self.mask(position), signed, torch.zeros_like(signed))


def state_of(both: Tensor, first: Tensor) -> Tensor:
    """The state, uint8, of entries that share (`both`) and, of the others, those that position 0 keeps (`first`)."""
    return torch.where(first, FIRST, SECOND).to(torch.uint8).masked_fill_(both, BOTH)
