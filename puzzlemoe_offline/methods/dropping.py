"""Dropping whole experts, those that the router chose least often on the calibration tokens.

NAEE (arXiv 2402.14800) drops experts by the error of every subset's output; usage is its cheap relative, which also
works with many experts.  Every layer keeps the same number, because config.json holds only one.
"""

from __future__ import annotations

from dataclasses import dataclass

from puzzlemoe_offline.calibration.passes import LayerPasses
from puzzlemoe_offline.calibration.statistics import ExpertStatistics
from puzzlemoe_offline.methods.base import (
    LayerMethod,
    LayerRecord,
    MethodError,
    NewLayer,
    dense_layer,
    expert_statistics,
)
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.families import expert_groups
from puzzlemoe_offline.model.layer_experts import SourceLayer


def remaining(experts: int, sparsity: float) -> int:
    """How many of a layer's experts stay."""
    return experts - round(experts * sparsity)


def most_used(counts: list[int], count: int) -> list[int]:
    """Ids of the experts with the most tokens, ascending; of equals the first."""
    return sorted(sorted(range(len(counts)), key=lambda expert: -counts[expert])[:count])


@dataclass(frozen=True)
class DropExperts(LayerMethod):
    """sparsity: share of every layer's experts that goes, with their router rows."""

    sparsity: float

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises MethodError when fewer experts than a token needs would stay, the router picks from groups, or a part
        that is copied has experts."""
        super().check(checkpoint)
        if (groups := expert_groups(checkpoint.text)) > 1:
            raise MethodError(
                f"{checkpoint.folder}: its router picks from {groups} groups of experts, which dropping would leave "
                "uneven; use --method hc-smoe-50 or hc-smoe-25, which keep the router"
            )
        if part := next((part for name, part in checkpoint.copied.items() if ".experts." in name), None):
            raise MethodError(
                f"{checkpoint.folder}: its {part} is copied with all {checkpoint.experts} experts, and config.json has "
                "one number for it and for the layers that would have fewer; use --method hc-smoe-50 or hc-smoe-25, "
                "which keep the number"
            )
        kept, needed = self.experts_left(checkpoint), checkpoint.experts_per_token
        if kept < needed:
            raise MethodError(
                f"{checkpoint.folder}: dropping would leave {kept} of {checkpoint.experts} experts, and every token "
                f"needs {needed}; use --method drop-25, or hc-smoe-50 or hc-smoe-25, which keep the router"
            )

    def bits_per_weight(self, checkpoint: Checkpoint) -> float:
        """bf16 for the experts that stay, nothing for the others."""
        return 16 * self.experts_left(checkpoint) / checkpoint.experts

    def experts_left(self, checkpoint: Checkpoint) -> int:
        """The rest."""
        return remaining(checkpoint.experts, self.sparsity)

    def observe(self, layer: SourceLayer, passes: LayerPasses) -> ExpertStatistics:
        """How many tokens each expert sees."""
        return expert_statistics(layer, passes)

    def merge(self, layer: SourceLayer, seen: ExpertStatistics) -> NewLayer:
        """The experts that saw the most tokens, in the source's order."""
        counts = seen.tokens.tolist()
        order = most_used(counts, self.experts_left(layer.checkpoint))
        record = LayerRecord(layer=layer.index, order=order, tokens=counts)
        return dense_layer(layer, [layer.expert(number) for number in order], record)
