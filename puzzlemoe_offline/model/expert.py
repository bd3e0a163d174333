"""One routed expert's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PROJECTIONS = ("gate", "up", "down")
"""An expert's matrices, as `Expert` names them."""


@dataclass(frozen=True)
class Expert:
    """One routed expert's dense weights, bf16: gate and up [I, H], down [H, I]."""

    gate: Tensor
    up: Tensor
    down: Tensor

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down projection, as in `PROJECTIONS`."""
        return self.gate, self.up, self.down

    def output(self, inputs: Tensor) -> Tensor:
        """What the expert makes of tokens [m, H], in their dtype, before the router's weights."""
        return F.linear(self.hidden(inputs), self.down.to(inputs.dtype))

    def hidden(self, inputs: Tensor) -> Tensor:
        """SiLU(gate) * up [m, I] of tokens [m, H], in their dtype: what the down projection sees."""
        return F.silu(F.linear(inputs, self.gate.to(inputs.dtype))) * F.linear(inputs, self.up.to(inputs.dtype))


@dataclass(frozen=True)
class StackedExperts:
    """All routed experts of a layer, bf16: gate and up [E, I, H], down [E, H, I]."""

    gate: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def of(cls, experts: list[Expert]) -> StackedExperts:
        """A copy of experts on one device."""
        return cls(*(torch.stack(matrices) for matrices in zip(*(each.matrices for each in experts), strict=True)))

    def __getitem__(self, number: int) -> Expert:
        """One of them, in the same memory."""
        return Expert(self.gate[number], self.up[number], self.down[number])
