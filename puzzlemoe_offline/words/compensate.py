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

from puzzlemoe_offline.words.column_coders import BLOCK, Coder, NeighbourTiles, coder_of
from puzzlemoe_offline.words.nearest import PackedMatrix, bounded_importance, check_finite
from puzzlemoe_offline.words.split_product import product
from puzzlemoe_vllm.format.codes import PairCode, TrellisCode

PANEL = 512
"""Columns of a matrix whose errors reach the rest of it together: one product on tensor cores, and one pass over the
rest, in place of one for every block."""


def fit_compensated(
    code: PairCode,
    weights: list[tuple[Tensor, Tensor]],
    factors: Tensor,
    group: int | None,
    rows: Tensor | None = None,
) -> list[PackedMatrix]:
    """The words of pairs of matrices [N, K], all of one shape; only by a GPU's kernel several pairs at once, which it
    takes little longer for than for one.

    factors: `inverse_factors` of what the experts of all pairs saw, pair by pair, [2 * pairs, K, K].
    rows: float32 [pairs, N, 2], how much the squared errors of rows count in trellis codes, where rows share bits; the
    same if None.
    Raises UnencodableWeight for a weight that the code cannot hold.
    """
    left = _by_columns([weight for pair in weights for weight in pair])
    importance = 1 / factors.diagonal(dim1=1, dim2=2).square()
    importance /= torch.stack([pair.mean() for pair in importance.split(2)]).repeat_interleave(2)[:, None]
    if isinstance(code, TrellisCode):
        squares = left.square().mean(dim=(1, 2))[:, None]
        bounded = bounded_importance(code, (importance[::2], importance[1::2]), (squares[::2], squares[1::2]))
        importance = torch.stack(bounded, dim=1).flatten(0, 1)
    return _code_columns(coder_of(code, group, left, rows), left, importance, factors).split(len(weights))


def fit_neighbours(
    code: TrellisCode, matrices: list[Tensor], factors: Tensor, group: int, rows: Tensor
) -> list[PackedMatrix]:
    """The same of matrices [N, K] by themselves: a word holds an entry of an even column and the one after it, so that
    the words of each matrix are those of a pair [N, K / 2].

    factors: [matrices, K, K]; group: words that share a step; rows: float32 [matrices, N].
    """
    left = _by_columns(matrices)
    importance = 1 / factors.diagonal(dim1=1, dim2=2).square()
    importance /= importance.mean(dim=1, keepdim=True)
    coder = NeighbourTiles(code, group, rows[..., None].expand(-1, -1, 2))
    return _code_columns(coder, left, importance, factors).split(len(matrices))


def _by_columns(matrices: list[Tensor]) -> Tensor:
    """Matrices [N, K] as float32 [matrices, K, N]: columns are the outer dimension from here on, so that each is
    contiguous.  Raises UnencodableWeight for one that is not finite."""
    rows, columns = matrices[0].shape
    left = torch.empty(len(matrices), columns, rows, device=matrices[0].device)
    for its, matrix in zip(left, matrices, strict=True):
        its.copy_(matrix.T)
    check_finite((left,))
    return left


def _code_columns(coder: Coder, left: Tensor, importance: Tensor, factors: Tensor) -> PackedMatrix:
    """Columns float32 [matrices, K, N], a panel after the other; they change until they are coded.

    importance: [matrices, K]; factors: [matrices, K, K].
    """
    words: list[Tensor] = []
    for start in range(0, left.shape[1], PANEL):
        here, later = slice(start, start + PANEL), slice(start + PANEL, None)
        coded, errors = _code_panel(coder, left[:, here], importance[:, here], factors[:, here, here])
        words += coded
        if start + PANEL < left.shape[1]:
            left[:, later] -= product(factors[:, here, later].mT, errors)
    # Row by row, as they are written: whatever decodes them is laid out as they are.
    return coder.packed(torch.cat(words).T.contiguous())


def _code_panel(coder: Coder, left: Tensor, importance: Tensor, factors: Tensor) -> tuple[list[Tensor], Tensor]:
    """The words of each block of a panel's columns, and errors as `Coder.code_block` gives them."""
    words, errors, size = [], torch.empty_like(left), BLOCK * coder.columns
    for start in range(0, left.shape[1], size):
        here, later = slice(start, start + size), slice(start + size, None)
        coded, errors[:, here] = coder.code_block(left[:, here], importance[:, here], factors[:, here, here])
        words.append(coded)
        left[:, later].baddbmm_(factors[:, here, later].mT, errors[:, here], alpha=-1)
    return words, errors
