"""Coding a pair column by column, each expert's remaining error pushed into its columns that are still to come.

This is GPTQ's update (arXiv 2210.17323) with two matrices instead of one: each expert has its own second moments of its
own inputs, and so its own factor, but one word holds both weights of an entry.  What each expert's error in a column
costs once the later columns have made up for what they can is 1 / U[j, j]^2, with U'U the inverse of its moments; the
word is the nearest one under these weights.  They must not be too unequal between the experts: a shared magnitude,
unlike GPTQ's rounding, does not bound the lighter expert's error, which may then grow from column to column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puzzlemoe_offline.calibrate import ProjectionInputs
from puzzlemoe_offline.fit import BALANCE, PackedMatrix, fit_angle16, fit_grid, nearest
from puzzlemoe_offline.merge import merge_least_squares
from puzzlemoe_vllm.format.codes import Angle16, GridCode, Mask16, PairCode

DAMPING = 0.1
"""Added to the moments' diagonal, relative to its mean.  GPTQ's usual 0.01 trusts the moments of a few thousand tokens
too much: an expert sees only its share of them."""

BLOCK = 128
"""Columns whose errors reach the rest of the matrix in one matrix product."""


def fit_compensated(
    code: PairCode,
    weights: tuple[Tensor, Tensor],
    inputs: tuple[ProjectionInputs, ProjectionInputs],
    group: int | None,
) -> PackedMatrix:
    """The words of two matrices [N, K] whose inputs have moments.

    Raises UnencodableWeight for a weight that the code cannot hold.
    """
    factors = torch.stack([inverse_factor(seen) for seen in inputs])
    spread = factors.diagonal(dim1=1, dim2=2)
    importance = 1 / spread.square()
    importance /= importance.mean()
    # Columns are the outer dimension from here on, so that each is contiguous.
    left = torch.stack([weight.float().T for weight in weights])
    words, grids = [], []
    for start in range(0, left.shape[1], BLOCK):
        block, scale = left[:, start : start + BLOCK].clone(), importance[:, start : start + BLOCK]
        factor = factors[:, start : start + BLOCK]
        inner = factor[:, :, start : start + BLOCK]
        errors = torch.empty_like(block)
        for column in range(block.shape[1]):
            if group and column % group == 0:
                part = slice(column, column + group)
                grids.append(_steps(code, block[:, part], scale[:, part], group))
            word, decoded = _nearest_words(code, block[:, column], scale[:, column], grids[-1] if group else None)
            words.append(word)
            errors[:, column] = (block[:, column] - decoded) / inner[:, column, column, None]
            block[:, column + 1 :] -= inner[:, column, column + 1 :, None] * errors[:, column, None]
        later = slice(start + BLOCK, None)
        left[:, later].baddbmm_(factor[:, :, later].mT, errors, alpha=-1)
    stacked = torch.stack(words, dim=1)
    if not isinstance(code, GridCode):
        return PackedMatrix(stacked)
    return PackedMatrix(code.pack(stacked), torch.stack(grids, dim=1).to(torch.bfloat16))


def inverse_factor(inputs: ProjectionInputs) -> Tensor:
    """Upper triangular U, float32 [K, K], with U'U the inverse of the damped moments per token^`BALANCE`."""
    assert inputs.moments is not None
    moments = inputs.moments.float() / inputs.tokens**BALANCE
    moments.diagonal().add_(DAMPING * moments.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    return torch.linalg.cholesky(inverse, upper=True)


def _steps(code: PairCode, block: Tensor, scale: Tensor, group: int) -> Tensor:
    """Steps, float32 [N], of one group of columns [2, group, N] as they are before the first of them is coded."""
    assert isinstance(code, GridCode)
    grid = fit_grid(code, (block[0].T, block[1].T), (scale[0], scale[1]), group).grid
    assert grid is not None
    return grid[:, 0].float()


def _nearest_words(code: PairCode, column: Tensor, scale: Tensor, step: Tensor | None) -> tuple[Tensor, Tensor]:
    """Words [N] of one column of both experts [2, N] and what they decode to, float32 [2, N]."""
    if isinstance(code, GridCode):
        assert step is not None
        index = nearest(
            code.magnitudes.to(column.device), column.abs()[..., None, None], step[:, None], scale[:, None, None, None]
        )
        negative = torch.signbit(column).int()
        word = code.words.to(column.device)[index.flatten().int(), negative[0], negative[1]]
        return word, (code.values.to(column.device)[:, word.int()] * step).to(torch.bfloat16).float()
    weights, scales = (column[0, :, None], column[1, :, None]), (scale[:1], scale[1:])
    if isinstance(code, Angle16):
        words = fit_angle16(code, weights, scales)
    else:
        assert isinstance(code, Mask16)
        words = code.encode(merge_least_squares(*weights, *scales))
    return words[:, 0], torch.stack([code.decode(words, position)[:, 0].float() for position in (0, 1)])
