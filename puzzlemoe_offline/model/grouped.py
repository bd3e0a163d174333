"""All experts of a layer at work on a batch in grouped products, which take no longer for many small experts than for a
few large ones; a GPU's way, though a CPU can."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzlemoe_offline.model.expert import StackedExperts


@dataclass(frozen=True)
class Grouping:
    """The slots of a batch, each a token with one of its experts, in the order of the experts.

    slots: int64 [M * k], their places in the router's choice [M, k]; ends: int32 [E], slots of all experts up to each.
    """

    slots: Tensor
    ends: Tensor
    choices: int

    @classmethod
    def of(cls, ids: Tensor, experts: int) -> Grouping:
        """Of the router's choice, int [M, k]."""
        chosen, slots = ids.flatten().sort(stable=True)
        every = torch.arange(experts, device=ids.device, dtype=chosen.dtype)
        return cls(slots, torch.searchsorted(chosen, every, right=True).int(), ids.shape[1])

    @property
    def counts(self) -> list[int]:
        """Slots of every expert; waits for the GPU."""
        counts: list[int] = self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()
        return counts

    def rows(self, tokens: Tensor) -> Tensor:
        """Rows [M, H] of tokens as rows [M * k, H] of slots."""
        return tokens[self.slots // self.choices]

    def summed(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """What the tokens get of the experts' outputs [M * k, H], in their dtype: sums in float32 with the router's
        weights [M, k]."""
        place = torch.empty_like(self.slots)
        place[self.slots] = torch.arange(len(place), device=place.device)
        total = torch.zeros(len(weights), outputs.shape[1], device=outputs.device)
        # Choice by choice: no row is added to by two threads, so that the sums are the same every time.
        for choice, rows in enumerate(place.view(-1, self.choices).unbind(1)):
            total.addcmul_(outputs[rows].float(), weights[:, choice, None].float())
        return total.to(outputs.dtype)


def hidden_of(experts: StackedExperts, inputs: Tensor, ends: Tensor) -> Tensor:
    """SiLU(gate) * up [m, I] of inputs [m, H] in the order of the experts."""
    hidden = F.silu(F.grouped_mm(inputs, experts.gate.to(inputs.dtype).mT, offs=ends))
    hidden *= F.grouped_mm(inputs, experts.up.to(inputs.dtype).mT, offs=ends)
    return hidden


def outputs_of(experts: StackedExperts, hidden: Tensor, ends: Tensor) -> Tensor:
    """The down projections' outputs [m, H] of hidden [m, I]."""
    return F.grouped_mm(hidden, experts.down.to(hidden.dtype).mT, offs=ends)
