"""One routed expert's weights."""

from __future__ import annotations

from dataclasses import dataclass

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
