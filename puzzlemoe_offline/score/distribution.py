"""What the weights of a dense model's experts look like: the two facts that the paper's rule and word rest on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import PROJECTIONS, Expert
from puzzlemoe_offline.model.weight_files import CheckpointError
from puzzlemoe_offline.words.pack import rows_at_once
from puzzlemoe_vllm.format.codes.mask16 import EXPONENT_OFFSET

RATIO_BINS = 1000
"""Bins of the ratio of Eq. 1, which lies between 0 and 1."""


def similar_share(tau: float) -> float:
    """Share of similar entries (Eq. 1) of two matrices of independent normal weights of one variance (Appendix B.2).

    The vector (w0, w1) then has a uniform direction: the angle a of (|w0|, |w1|) is uniform from 0 to 90 degrees.  The
    ratio ||w0| - |w1|| / (|w0| + |w1|) is |1 - tan a| / (1 + tan a) = |tan(45 degrees - a)|, which is at most tau
    where a is within arctan(tau) of 45 degrees: 2 arctan(tau) of 90 degrees, a share of (4 / pi) arctan(tau).
    """
    return 4 / math.pi * math.atan(tau)


def exponent_counts(weight: Tensor) -> Tensor:
    """How many weights of a bf16 tensor have each exponent field, int64 [256]."""
    return torch.bincount((weight.flatten().view(torch.int16) >> 7) & 0xFF, minlength=256)


def ratio_counts(weight0: Tensor, weight1: Tensor) -> Tensor:
    """Histogram of the ratio of Eq. 1 over the entries of two matrices [N, K], int64 [RATIO_BINS].

    Bin i counts ratios of at least i / RATIO_BINS and, but for the last, below (i + 1) / RATIO_BINS; 0/0 counts as 0.
    """
    counts = torch.zeros(RATIO_BINS, dtype=torch.int64)
    rows = rows_at_once(weight0)
    for block0, block1 in zip(weight0.split(rows), weight1.split(rows), strict=True):
        magnitude0, magnitude1 = block0.float().abs(), block1.float().abs()
        ratio = ((magnitude0 - magnitude1).abs() / (magnitude0 + magnitude1)).nan_to_num(nan=0.0)
        index = (ratio.flatten() * RATIO_BINS).int().clamp(max=RATIO_BINS - 1)
        counts += torch.bincount(index, minlength=RATIO_BINS)
    return counts


@dataclass(frozen=True)
class Distribution:
    """exponents: int64 [256], weights by bf16 exponent field; ratios: int64 [RATIO_BINS], entries of pairs of experts
    by the ratio of Eq. 1."""

    exponents: Tensor
    ratios: Tensor

    def shares(self) -> tuple[list[float], list[float]]:
        """Thresholds tau in (0, 1] and the share of entries whose ratio is below each."""
        cumulative = self.ratios.cumsum(0) / self.ratios.sum()
        return [(index + 1) / RATIO_BINS for index in range(RATIO_BINS)], cumulative.tolist()

    def in_word(self) -> float:
        """Share of the weights whose exponent fits the five bits that a mask16 word keeps of it."""
        kept = self.exponents[EXPONENT_OFFSET : EXPONENT_OFFSET + 32].sum()
        return float(kept / self.exponents.sum())


def expert_distribution(checkpoint: Checkpoint) -> Distribution:
    """Counts over all routed experts; pairs are experts 2p and 2p + 1 of a layer, as ids carry no meaning.

    Raises CheckpointError for a packed model, whose words no longer tell.
    """
    if checkpoint.quantization:
        raise CheckpointError(f"{checkpoint.folder} is packed; --plots draws the weights of its dense source")
    exponents, ratios = torch.zeros(256, dtype=torch.int64), torch.zeros(RATIO_BINS, dtype=torch.int64)
    for layer in checkpoint.moe_layers:
        partner: Expert | None = None
        for number in range(checkpoint.experts):
            expert = checkpoint.expert(layer, number)
            for projection in PROJECTIONS:
                weight = getattr(expert, projection)
                exponents += exponent_counts(weight)
                if partner:
                    ratios += ratio_counts(getattr(partner, projection), weight)
            partner = None if partner else expert
    return Distribution(exponents, ratios)
