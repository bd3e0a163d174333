"""A few calibration tokens, kept to measure what merging a layer does to its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_offline.model.layerwise import StreamedExperts

TOKENS = 2048
"""Tokens that are kept of a layer."""


@dataclass
class SampledTokens:
    """MoE inputs and outputs of the first tokens of a layer."""

    batches: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def record(self, hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        """Keeps hidden [M, H], ids [M, k], weights [M, k] and out [M, H] up to `TOKENS` tokens."""
        if room := TOKENS - sum(len(batch[0]) for batch in self.batches):
            self.batches.append((hidden[:room].clone(), ids[:room].clone(), weights[:room].clone(), out[:room].clone()))

    def output_error(self, expert: Callable[[int], Expert]) -> float:
        """||y - y'|| / ||y||, with y the original experts' output and y' that of `expert`, by the source's ids."""
        error = energy = 0.0
        for hidden, ids, weights, out in self.batches:
            merged = StreamedExperts(expert)(hidden, ids, weights)
            error += float((merged.float() - out.float()).square().sum())
            energy += float(out.float().square().sum())
        return (error / energy) ** 0.5 if energy else 0.0
