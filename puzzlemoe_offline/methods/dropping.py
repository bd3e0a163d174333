"""Dropping whole experts, those that the router chose least often on the calibration tokens.

NAEE (arXiv 2402.14800) drops experts by the error of every subset's output; usage is its cheap relative, which also
works with many experts.  Every layer keeps the same number, because config.json holds only one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from puzzlemoe_offline.methods.base import BaselineError, Needs, NewLayer, SourceLayer
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.families import expert_groups


def remaining(experts: int, sparsity: float) -> int:
    """How many of a layer's experts stay."""
    return experts - round(experts * sparsity)


@dataclass(frozen=True)
class DropExperts:
    """sparsity: share of every layer's experts that goes, with their router rows."""

    sparsity: float
    needs: ClassVar[Needs] = "norms"

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises BaselineError when fewer experts than a token needs would stay, or the router picks from groups."""
        if (groups := expert_groups(checkpoint.config)) > 1:
            raise BaselineError(
                f"{checkpoint.folder}: its router picks from {groups} groups of experts, which dropping would leave "
                "uneven; use --method hc-smoe-50 or hc-smoe-25, which keep the router"
            )
        kept, needed = remaining(checkpoint.experts, self.sparsity), checkpoint.experts_per_token
        if kept < needed:
            raise BaselineError(
                f"{checkpoint.folder}: dropping would leave {kept} of {checkpoint.experts} experts, and every token "
                f"needs {needed}; use --method drop-25, or hc-smoe-50 or hc-smoe-25, which keep the router"
            )

    def bits_per_weight(self, checkpoint: Checkpoint) -> float:
        """bf16 for the experts that stay, nothing for the others."""
        return 16 * remaining(checkpoint.experts, self.sparsity) / checkpoint.experts

    def apply(self, layer: SourceLayer) -> NewLayer:
        """The experts that saw the most tokens, in the source's order."""
        assert layer.statistics is not None
        counts = layer.statistics.tokens.tolist()
        most = sorted(range(len(counts)), key=lambda expert: -counts[expert])
        order = sorted(most[: remaining(len(counts), self.sparsity)])
        return NewLayer(order, [layer.experts[expert] for expert in order])
