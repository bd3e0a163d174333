"""By what factors an error in one column is pushed into those still to come: those of the inverse moments."""

from __future__ import annotations

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.statistics import ProjectionInputs
from puzzlemoe_offline.words.nearest import BALANCE
from puzzlemoe_offline.words.split_product import times_upper, upper_times
from puzzlemoe_vllm.errors import UserError

DAMPING = 0.1
"""Added to the moments' diagonal, relative to its mean.  GPTQ's usual 0.01 trusts the moments of a few thousand tokens
too much: an expert sees only its share of them."""

FACTORED_TOGETHER = 2048
"""Columns up to which a GPU factors many moments in one batch: larger ones keep it busy alone, and it is faster."""


class MomentsError(UserError):
    """Second moments of inputs that are too large for float32, so that no error can be compensated."""


def inverse_factors(inputs: list[ProjectionInputs], damping: float = DAMPING) -> Tensor:
    """For each the upper triangular U, float32 [n, K, K], with U'U the inverse of the damped moments per
    token^`BALANCE`.  damping: as `DAMPING`.

    Raises MomentsError for moments that have none.
    """
    if len(inputs) > 1 and len(inputs[0].norms) > FACTORED_TOGETHER:
        return torch.cat([inverse_factors([seen], damping) for seen in inputs])
    given = [(seen.moments, seen.tokens) for seen in inputs if seen.moments is not None]
    moments = torch.stack([its.float() / tokens**BALANCE for its, tokens in given])
    means = torch.stack([its.diagonal().mean() for its in moments])
    # An expert whose inputs are all zero: the down projection of one whose gate or up projection is.
    moments.diagonal(dim1=1, dim2=2).add_(torch.where(means > 0, damping * means, 1.0)[:, None])
    # With rows and columns in reverse the lower factor becomes an upper one, R R' = moments; its inverse is U.
    lower, failed = torch.linalg.cholesky_ex(moments.flip(1, 2))
    del moments
    upper = lower.flip(1, 2)
    del lower
    factors = _inverse(upper)
    diagonal = factors.diagonal(dim1=1, dim2=2)
    if bool(failed.any()) or not bool((torch.isfinite(diagonal) & (diagonal > 0)).all()):
        raise MomentsError(
            "on the calibration text the squares of the inputs leave float32: copy or download the source again if it "
            "should have no such activations"
        )
    return factors


def _inverse(upper: Tensor) -> Tensor:
    """Of upper triangular matrices [n, K, K]."""
    columns = upper.shape[1]
    if not upper.is_cuda or columns <= FACTORED_TOGETHER:
        solved: Tensor = torch.linalg.solve_triangular(upper, torch.eye(columns, device=upper.device), upper=True)
        return solved
    # By halves: a third of the operations of a solution with the identity, and nearly all of them in products.
    half = columns // 2
    inverse = torch.zeros_like(upper, memory_format=torch.contiguous_format)
    inverse[:, :half, :half] = first = _inverse(upper[:, :half, :half])
    inverse[:, half:, half:] = last = _inverse(upper[:, half:, half:])
    torch.neg(upper_times(first, times_upper(upper[:, :half, half:], last)), out=inverse[:, :half, half:])
    return inverse
