"""Merging experts in threes by the paper's rule, to see what a third expert per word would cost (PuzzleMoE, Table 6).

Three signs, three masks and a magnitude of twelve bits take 18 bits, so no 16-bit word holds them: evaluation only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.passes import LayerPasses
from puzzlemoe_offline.calibration.statistics import FEW_TOKENS, ExpertStatistics
from puzzlemoe_offline.methods.base import LayerMethod, NewLayer, dense_layer, expert_statistics
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import PROJECTIONS, Expert
from puzzlemoe_offline.model.layer_experts import SourceLayer
from puzzlemoe_offline.words.pack import rows_at_once
from puzzlemoe_offline.words.paper_rule import similar

WORD_BITS = {1: 16, 2: 16, 3: 18}
"""Bits of an entry of a group, by the number of its experts."""


def groups_of_three(experts: int, seed: int) -> list[list[int]]:
    """Random groups of three experts; one or two that are left over form the last group."""
    order = list(range(experts))
    random.Random(seed).shuffle(order)
    return [order[first : first + 3] for first in range(0, experts, 3)]


def merge_group(weights: Tensor, norms: Tensor, tau: float) -> Tensor:
    """What each of g experts' matrices becomes when all share one magnitude per entry, float32 [g, N, K].

    weights: [g, N, K]; norms: [g, K], each expert's L2 norms of its input columns.  Where every two magnitudes are
    similar (Eq. 1), which is where the largest and the smallest are, all share the mean; elsewhere the most salient
    weight stays, ties going to the larger magnitude and then to the first, and the others become zero.  Two matrices
    are merged as by the paper's rule for pairs.
    """
    magnitudes = weights.float().abs()
    saliency = magnitudes * norms.float()[:, None]
    best, winner = saliency[0], torch.zeros(weights.shape[1:], dtype=torch.int64, device=weights.device)
    largest = magnitudes[0]
    for position in range(1, len(weights)):
        tied = saliency[position] == best
        better = (saliency[position] > best) | (tied & (magnitudes[position] > largest))
        winner = torch.where(better, position, winner)
        best = torch.where(better, saliency[position], best)
        largest = torch.where(better, magnitudes[position], largest)
    alone = torch.zeros_like(magnitudes).scatter_(0, winner[None], largest[None])
    together = similar(magnitudes.amax(dim=0), magnitudes.amin(dim=0), tau)
    return torch.where(together, magnitudes.mean(dim=0), alone) * torch.where(torch.signbit(weights), -1.0, 1.0)


def merge_in_blocks(weights: list[Tensor], norms: Tensor, tau: float) -> list[Tensor]:
    """`merge_group` on a block of rows at a time, which bounds the float32 scratch memory; bf16."""
    rows = rows_at_once(weights[0])
    blocks = zip(*(weight.split(rows) for weight in weights), strict=True)
    merged = [merge_group(torch.stack(block), norms, tau).to(torch.bfloat16) for block in blocks]
    return list(torch.cat(merged, dim=1))


@dataclass(frozen=True)
class MergeThree(LayerMethod):
    """tau: similarity threshold of Eq. 1; seed: of the random groups."""

    tau: float = 0.4
    seed: int = 0

    def bits_per_weight(self, checkpoint: Checkpoint) -> float:
        """As if 18 bits held an entry of three experts."""
        sizes = [len(group) for group in groups_of_three(checkpoint.experts, self.seed)]
        return sum(WORD_BITS[size] for size in sizes) / checkpoint.experts

    def observe(self, layer: SourceLayer, passes: LayerPasses) -> ExpertStatistics:
        """Norms of every expert's input columns."""
        return expert_statistics(layer, passes)

    def merge(self, layer: SourceLayer, seen: ExpertStatistics) -> NewLayer:
        """Every expert in its merged form; a group with an expert that saw few tokens is merged by magnitude alone."""
        source = layer.experts
        merged = list(source)
        for members in groups_of_three(len(merged), self.seed * 100_003 + layer.index):
            few = any(int(seen.tokens[member]) < FEW_TOKENS for member in members)
            projections = []
            for index, projection in enumerate(PROJECTIONS):
                weights = [getattr(source[member], projection) for member in members]
                norms = torch.stack([seen.inputs(member, index).norms for member in members])
                projections.append(merge_in_blocks(weights, torch.ones_like(norms) if few else norms, self.tau))
            for member, *new in zip(members, *projections, strict=True):
                merged[member] = Expert(*(weight.clone() for weight in new))
        return dense_layer(layer, merged)
