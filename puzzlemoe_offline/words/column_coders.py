"""What gives the columns of a block their words, one by one or a tile's width at a time; errors go on inside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from puzzlemoe_offline.words.nearest import (
    STEP_MULTIPLES,
    PackedMatrix,
    encode_matrix,
    fit_least_squares,
    fit_table,
    stored_steps,
    typical_steps,
)
from puzzlemoe_vllm.format.codes import PairCode, TableCode, TrellisCode
from puzzlemoe_vllm.format.codes.trellis import TILE_COLUMNS, values

BLOCK = 128
"""Columns of words whose errors reach the rest of the matrix in one matrix product."""


class Columns:
    """Codes the columns of one block after another, for the codes without steps.

    columns: of a matrix, in a column of words.
    """

    columns = 1

    def __init__(self, pair_code: PairCode):
        self.pair_code = pair_code

    def code_block(self, block: Tensor, importance: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Words [B, N] of columns [2, B, N], which stay as they are, and errors [2, B, N], each over its column's
        diagonal element of the factor.

        importance: weights of the squared errors [2, B]; factor: [2, B, B].
        """
        block = block.clone()  # a column changes until it is coded
        errors = torch.empty_like(block)
        self.begin(block, importance)
        for column in range(block.shape[1]):
            error = errors[:, column]
            torch.sub(block[:, column], self.code(column), out=error)
            error /= factor[:, column, column, None]
            block[:, column + 1 :].baddbmm_(factor[:, column, column + 1 :, None], error[:, None], alpha=-1)
        return self.words(), errors

    def begin(self, block: Tensor, importance: Tensor) -> None:
        """A block of columns and its importance, as `code_block` has them."""
        self.block, self.importance = block, importance
        self.coded: list[Tensor] = []

    def code(self, column: int) -> Tensor:
        """What the nearest words of a column decode to, float32 [2, N]."""
        weights = self.block[0, column, :, None], self.block[1, column, :, None]
        importance = self.importance[:1, column], self.importance[1:, column]
        words = fit_least_squares(self.pair_code, weights, importance, group=None).words
        self.coded.append(words[:, 0])
        return torch.stack([self.pair_code.decode(words, position)[:, 0].float() for position in (0, 1)])

    def words(self) -> Tensor:
        """Words [B, N] of the block's columns."""
        return torch.stack(self.coded)

    def packed(self, words: Tensor) -> PackedMatrix:
        """What all blocks' words [N, K] are stored as."""
        return PackedMatrix(words)


class ColumnsWithSteps(Columns):
    """The same for codes with steps; what does not depend on earlier columns is computed for a whole block."""

    def __init__(self, table_code: TableCode, group: int, matrix: Tensor):
        """matrix: [2, K, N] of the columns to come, for its device and shape."""
        super().__init__(table_code)
        self.table_code, self.group = table_code, group
        self.magnitudes = table_code.magnitudes.to(matrix.device).T.contiguous()
        self.steps: list[Tensor] = []
        """float32 [N] of every group so far."""
        self.index = torch.empty(BLOCK, matrix.shape[2], dtype=torch.int64, device=matrix.device)

    def begin(self, block: Tensor, importance: Tensor) -> None:
        """As in `Columns`."""
        self.block, self.importance = block, importance
        # The terms of the scores that `nearest` computes, for each column of the block.
        self.linear = -importance.T[:, :, None] * self.magnitudes
        self.constant = importance.T @ (self.magnitudes.square() / 2)

    def code(self, column: int) -> Tensor:
        """As in `Columns`; a group's steps are fitted when its first column is coded."""
        if column % self.group == 0:
            part = slice(column, column + self.group)
            block, importance = self.block[:, part].mT, self.importance[:, part]
            fitted = fit_table(self.table_code, (block[0], block[1]), (importance[0], importance[1]), self.group)
            assert fitted.steps is not None
            self.steps.append(fitted.steps[:, 0].float())
            self.inverse = 1 / self.steps[-1].clamp(min=torch.finfo(torch.float32).tiny)
        weights, index = self.block[:, column], self.index[column]
        scores = torch.addmm(self.constant[column], (weights.abs() * self.inverse).T, self.linear[column])
        torch.argmin(scores, dim=1, out=index)
        value = self.magnitudes.index_select(1, index).copysign_(weights).mul_(self.steps[-1])
        return value.to(torch.bfloat16).float()

    def words(self) -> Tensor:
        """As in `Columns`."""
        negative = torch.signbit(self.block)
        return self.table_code.words_of(self.index[: self.block.shape[1]], (negative[0], negative[1]))

    def packed(self, words: Tensor) -> PackedMatrix:
        """As in `Columns`."""
        return packed_with_steps(self.table_code, words, self.steps)


class ColumnsInKernel:
    """The same on a GPU, a block of the columns of one or several pairs at a time."""

    columns = 1

    def __init__(self, table_code: TableCode, group: int):
        self.table_code, self.group = table_code, group
        self.steps: list[Tensor] = []

    def code_block(self, block: Tensor, importance: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Columns`, of columns [2 * pairs, B, N]: the words [B, pairs * N] of one pair lie beside those of
        another."""
        from puzzlemoe_offline.words.nearest_kernels import code_columns

        words, steps, errors = code_columns(self.table_code, block, importance, factor, self.group, STEP_MULTIPLES)
        self.steps.extend(steps)
        return words, errors

    def packed(self, words: Tensor) -> PackedMatrix:
        """As in `Columns`."""
        return packed_with_steps(self.table_code, words, self.steps)


class Tiles:
    """The same for trellis codes, a tile's width of columns of one or several pairs at a time.

    Such columns get their words together, and then their errors are pushed on.  When a group of columns has its words,
    its steps are fitted to them anew, by the errors that are left once later columns have made up for what they can.
    The rows of one pair lie below those of another wherever pairs are matrices, as the words and steps are.
    """

    columns = 1

    def __init__(self, code: TrellisCode, group: int, rows: Tensor):
        """rows: float32 [pairs, N, 2], how much the squared errors of rows count."""
        self.code, self.group, self.rows = code, group, rows
        self.steps: list[Tensor] = []
        """bf16 [pairs * N] of every group so far."""

    def code_block(self, block: Tensor, importance: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """As in `ColumnsInKernel`."""
        left = block.clone()
        words, errors = [], torch.empty_like(block)
        size = self.group * self.columns
        for first in range(0, block.shape[1], size):
            here, later = slice(first, first + size), slice(first + size, None)
            coded, errors[:, here] = self._code_group(left[:, here], importance[:, here], factor[:, here, here])
            left[:, later].baddbmm_(factor[:, here, later].mT, errors[:, here], alpha=-1)
            words.append(coded)
        return torch.cat(words), errors

    def _code_group(self, group: Tensor, importance: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        weighed = (self.rows[:, :, None] * self._by_word(importance[..., None])[:, None]).flatten(0, 1)
        steps = stored_steps(typical_steps(self._by_word(group), weighed, self.group) * self.code.unit_step)
        left, stored = group.clone(), []
        for first, importances in enumerate(weighed.split(TILE_COLUMNS, dim=1)):
            size = TILE_COLUMNS * self.columns
            here, later = slice(first * size, (first + 1) * size), slice((first + 1) * size, None)
            stored.append(encode_matrix(self.code, self._by_word(left[:, here]), importances, steps))
            errors = self._errors(left[:, here], stored[-1], steps, factor[:, here, here])
            left[:, later].baddbmm_(factor[:, here, later].mT, errors, alpha=-1)
        words = torch.cat(stored, dim=1)
        steps = self._refitted(group, words, steps, factor)
        self.steps.append(steps[:, 0])
        return self.code.unpack(words).T, self._errors(group, words, steps, factor)

    def _errors(self, exact: Tensor, words: Tensor, steps: Tensor, factor: Tensor) -> Tensor:
        """Errors [matrices, columns, N] of stored words in place of columns, over the factor, [matrices, columns,
        columns]: each over its diagonal element, with what the earlier ones push into it."""
        decoded = self._by_matrix([self.code.decode(words, position, steps).float() for position in (0, 1)])
        errors: Tensor = torch.linalg.solve_triangular(factor, exact.mT - decoded, upper=True, left=False).mT
        return errors

    def _refitted(self, exact: Tensor, words: Tensor, steps: Tensor, factor: Tensor) -> Tensor:
        """bf16 steps [pairs * N, 1] with the least squares of such errors."""
        value = self._by_matrix(values(self.code.states(words)))
        over, wanted = (
            torch.linalg.solve_triangular(factor, each, upper=True, left=False) for each in (value, exact.mT)
        )
        rows = self.rows.flatten(0, 1)[:, None]
        product, square = ((rows * self._by_word((over * each).mT)).sum(dim=(1, 2))[:, None] for each in (wanted, over))
        return stored_steps((product / square).where(square > 0, steps.float()))

    def _by_word(self, columns: Tensor) -> Tensor:
        """[pairs * N, columns, 2], by position, of columns [2 * pairs, columns, N]."""
        by_word: Tensor = columns.unflatten(0, (-1, 2)).permute(0, 3, 2, 1).flatten(0, 1)
        return by_word

    def _by_matrix(self, positions: Sequence[Tensor]) -> Tensor:
        """[2 * pairs, N, columns] of what both positions of all pairs are, [pairs * N, columns] each."""
        return torch.stack([matrix.unflatten(0, self.rows.shape[:2]) for matrix in positions], dim=1).flatten(0, 1)

    def packed(self, words: Tensor) -> PackedMatrix:
        """As in `Columns`."""
        return packed_with_steps(self.code, words, self.steps)


class NeighbourTiles(Tiles):
    """The same with one matrix in place of a pair: a word's positions are an even column and the one after it."""

    columns = 2

    def _by_word(self, columns: Tensor) -> Tensor:
        """[matrices * N, columns / 2, 2] of columns [matrices, columns, N]."""
        by_word: Tensor = columns.mT.flatten(0, 1).unflatten(1, (-1, 2))
        return by_word

    def _by_matrix(self, positions: Sequence[Tensor]) -> Tensor:
        """[matrices, N, columns] of what both positions are, [matrices * N, columns / 2] each."""
        by_matrix: Tensor = torch.stack([*positions], dim=-1).flatten(1).unflatten(0, self.rows.shape[:2])
        return by_matrix


def packed_with_steps(code: TableCode | TrellisCode, words: Tensor, steps: list[Tensor]) -> PackedMatrix:
    """Words [N, K], one a column, and the steps [N] of every group of columns, as they are stored.

    Raises UnencodableWeight as `stored_steps` does.
    """
    return PackedMatrix(code.pack(words), stored_steps(torch.stack(steps, dim=1)))


Coder = Columns | ColumnsInKernel | Tiles
"""What codes the columns of one block after another."""


def coder_of(code: PairCode, group: int | None, matrix: Tensor, rows: Tensor | None) -> Coder:
    """What codes the columns of matrices, float32 [2 * pairs, K, N]; rows: as in `fit_compensated`."""
    if isinstance(code, TrellisCode):
        assert group is not None
        return Tiles(code, group, matrix.new_ones(len(matrix) // 2, matrix.shape[2], 2) if rows is None else rows)
    if not isinstance(code, TableCode):
        return Columns(code)
    assert group is not None
    return ColumnsInKernel(code, group) if matrix.is_cuda else ColumnsWithSteps(code, group, matrix)
