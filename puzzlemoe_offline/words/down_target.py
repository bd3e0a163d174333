"""The down projection that packed gate and up projections need: it makes up for what they have lost.

It sees their hidden values h' in place of h, and W h' lacks W (h - h') of the expert's output.  What a linear function
of h' gives of that, by least squares over the expert's tokens, is added to W before its words are chosen, under the
moments of h'.  GPTAQ (arXiv 2504.02692) does this from layer to layer; within an expert, layers stay independent of
each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzlemoe_offline.calibration.routed_tokens import RoutedTokens
from puzzlemoe_offline.calibration.statistics import FEW_TOKENS, ProjectionInputs, add_products, weighted
from puzzlemoe_offline.finite import all_finite
from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_offline.words.factors import MomentsError
from puzzlemoe_offline.words.nearest import BALANCE
from puzzlemoe_offline.words.split_product import times_upper, times_upper_transposed

CORRECTION_DAMPING = 0.3
"""Of the moments of h', in place of `factors.DAMPING`: what an output lacks is noise for the most part, and a few
thousand tokens tell less of it than of h'."""

MOMENTS_TOGETHER = 2048
"""Columns whose moments are added up in one product: what lies below their own is not computed."""


@dataclass(frozen=True)
class DownInputs:
    """What the down projection of a packed expert sees, and what its output then lacks.

    seen: the hidden values h', with moments; lacking: float32 [H, I], the sum over tokens of W (h - h') h'^T, both
    multiplied by the router's weight.
    """

    seen: ProjectionInputs
    lacking: Tensor

    @classmethod
    def of(
        cls, exact: Expert, packed: Expert, number: int, tokens: RoutedTokens, source: ProjectionInputs
    ) -> DownInputs:
        """packed: the expert with its packed gate and up projections; number: its id in `tokens`; source: the norms of
        h, which count in place of h' where the expert saw few tokens."""
        hidden, intermediate = exact.down.shape
        lacking = torch.zeros(hidden, intermediate, device=exact.down.device)
        if source.tokens < FEW_TOKENS:
            return cls(ProjectionInputs(source.norms, source.tokens, source.norms.square().diag()), lacking)
        moments = torch.zeros(intermediate, intermediate, device=exact.down.device)
        for inputs, weights in tokens.of(number):
            found = packed.hidden(inputs)
            output = F.linear(exact.hidden(inputs) - found, exact.down.to(inputs.dtype))
            output, found = weighted(output, weights), weighted(found, weights)
            _add_upper_moments(moments, found)
            add_products(lacking, output, found)
        _mirror(moments)
        return cls(ProjectionInputs(moments.diagonal().sqrt(), source.tokens, moments), lacking)

    def target(self, weight: Tensor, factor: Tensor) -> Tensor:
        """Weights float32 [H, I] with the least squared error of the expert's output; factor: `inverse_factors` of what
        is seen, [I, I], with `CORRECTION_DAMPING`, which keeps them near `weight`.

        Raises MomentsError for outputs that are too large.
        """
        whitened = times_upper_transposed((self.lacking / self.seen.tokens**BALANCE)[None], factor[None])
        found = times_upper(whitened, factor[None])[0]
        if not all_finite(found):
            raise MomentsError(
                "on the calibration text the outputs of this projection leave float32: copy or download the source "
                "again if it should have no such activations"
            )
        return found.add_(weight)


def _add_upper_moments(sums: Tensor, rows: Tensor) -> None:
    """Adds X'X of rows X [m, K] to sums [K, K], but for blocks below the diagonal."""
    for start in range(0, len(sums), MOMENTS_TOGETHER):
        here = slice(start, start + MOMENTS_TOGETHER)
        add_products(sums[here, start:], rows[:, here], rows[:, start:])


def _mirror(sums: Tensor) -> None:
    """Fills those blocks from above the diagonal."""
    for start in range(0, len(sums), MOMENTS_TOGETHER):
        here, later = slice(start, start + MOMENTS_TOGETHER), slice(start + MOMENTS_TOGETHER, None)
        sums[later, here] = sums[here, later].T
