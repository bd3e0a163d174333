"""Experts that were merged in clusters: top-k over the original experts, as the router knows them, becomes a choice of
clusters."""

from __future__ import annotations

from torch import Tensor


def choose_clusters(weights: Tensor, ids: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Routing weights and ids in which every cluster stands at most once in a row, with the sum of its weights.

    weights: float [M, k]; ids: int [M, k], original experts, negative for padding; centres: int [E], the expert whose
    id an expert's cluster has.  Returns the same shapes and dtypes, with -1 where a cluster stood before in the row.
    """
    chosen = centres[ids.clamp(min=0).long()].to(ids.dtype).where(ids >= 0, -1)
    same = chosen[:, :, None] == chosen[:, None, :]
    return (same * weights[:, None, :]).sum(dim=-1), chosen.masked_fill(same.tril(-1).any(dim=-1), -1)
