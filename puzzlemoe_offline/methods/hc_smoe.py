"""HC-SMoE (arXiv 2410.08589): experts clustered by their mean outputs, each cluster merged into one expert.

Clusters are agglomerative with average linkage over the Euclidean distance of mean outputs; a cluster's expert is the
mean of its members' weights by how many tokens each saw.  The router stays, so a dense checkpoint repeats a cluster's
expert under every id of its members; software that knew clusters would store it once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzlemoe_offline.calibration.passes import LayerPasses
from puzzlemoe_offline.extras import require
from puzzlemoe_offline.methods.base import LayerMethod, NewLayer, dense_layer, expert_statistics
from puzzlemoe_offline.methods.dropping import remaining
from puzzlemoe_offline.methods.mergemoe import mean_by_usage, usage_shares
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import PROJECTIONS, Expert
from puzzlemoe_offline.model.layer_experts import SourceLayer


class MeanOutputs:
    """Mean output of every expert of a layer over all tokens, whether the router chose it for them or not."""

    def __init__(self, experts: list[Expert]):
        self.experts = experts
        hidden = experts[0].down.shape[0]
        self.total = torch.zeros(len(experts), hidden, dtype=torch.float64, device=experts[0].gate.device)
        self.tokens = 0

    def record(self, hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        """Adds a batch of MoE inputs, hidden [M, H]; the router's choice and the layer's output do not matter."""
        self.tokens += len(hidden)
        for number, expert in enumerate(self.experts):
            gate, up = F.linear(hidden, expert.gate.to(hidden.dtype)), F.linear(hidden, expert.up.to(hidden.dtype))
            middle = F.silu(gate) * up
            # The down projection is linear, so it maps the mean.
            self.total[number] += F.linear(middle.double().sum(dim=0), expert.down.double())

    def mean(self) -> Tensor:
        """float32 [E, H]."""
        return (self.total / self.tokens).float()


def clusters_of(features: Tensor, count: int) -> list[list[int]]:
    """`count` clusters of the rows of [E, H], each ascending, in the order of their first rows."""
    from scipy.cluster.hierarchy import cut_tree, linkage  # of an extra that only comparing needs

    labels = cut_tree(linkage(features.double().cpu().numpy(), method="average"), n_clusters=count)[:, 0].tolist()
    members: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        members.setdefault(label, []).append(row)
    return list(members.values())


@dataclass(frozen=True)
class _Seen:
    """Of a layer: tokens int64 [E] of every expert, outputs float32 [E, H], the mean ones."""

    tokens: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class HcSmoe(LayerMethod):
    """sparsity: share of every layer's experts that goes by merging."""

    sparsity: float

    def check(self, checkpoint: Checkpoint) -> None:
        """As in `LayerMethod`, and MissingExtra without scipy."""
        require("compare")
        super().check(checkpoint)

    def bits_per_weight(self, checkpoint: Checkpoint) -> float:
        """bf16 for one expert per cluster."""
        return 16 * remaining(checkpoint.experts, self.sparsity) / checkpoint.experts

    def observe(self, layer: SourceLayer, passes: LayerPasses) -> _Seen:
        """Mean outputs, and how many tokens each expert sees."""
        outputs = MeanOutputs(layer.experts)
        tokens = expert_statistics(layer, passes, record=outputs.record).tokens
        return _Seen(tokens, outputs.mean())

    def merge(self, layer: SourceLayer, seen: _Seen) -> NewLayer:
        """Every expert replaced by its cluster's; a cluster that saw no tokens is a plain mean."""
        merged = layer.experts
        source = list(merged)
        for members in clusters_of(seen.outputs, remaining(len(merged), self.sparsity)):
            shares = usage_shares(seen.tokens[members])
            experts = [source[member] for member in members]
            gate, up, down = (
                mean_by_usage([getattr(expert, projection) for expert in experts], shares).to(torch.bfloat16)
                for projection in PROJECTIONS
            )
            for member in members:
                # A checkpoint's tensors must not share memory.
                merged[member] = Expert(gate.clone(), up.clone(), down.clone())
        return dense_layer(layer, merged)
