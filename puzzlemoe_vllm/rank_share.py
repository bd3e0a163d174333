"""Which columns of an expert's intermediate size a tensor-parallel rank holds, and how it cuts their step groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puzzlemoe_vllm.format.codes import GROUP_SIZES


@dataclass(frozen=True)
class RankShare:
    """A rank's `columns` of the intermediate size, from `start` on.

    front, back: columns of zeros beside them in the rank's parameters, so that groups begin where the model's do.
    group_size: columns that share a step on this rank; None for codes without steps.
    repeats: how many of the rank's groups have the same step of the checkpoint's.
    """

    start: int
    columns: int
    front: int = 0
    back: int = 0
    group_size: int | None = None
    repeats: int = 1

    @property
    def padded(self) -> int:
        """Columns of the rank's parameters."""
        return self.front + self.columns + self.back

    def tiles(self, width: int) -> tuple[int, int, int]:
        """The tiles of so many columns that hold the rank's: where they begin in the model, and in the rank's
        parameters, and their columns.  What else is in the outermost meets hidden values of zero, which the zeros
        beside the rank's rows of gate and up projection make."""
        first = self.start // width * width
        return first, first - (self.start - self.front), -(-(self.start + self.columns) // width) * width - first

    def repeat(self, steps: Tensor) -> Tensor:
        """Steps [N, groups] of columns that are not shared out, one for each of the rank's smaller groups."""
        return steps if self.repeats == 1 else steps.repeat_interleave(self.repeats, dim=1)

    def cut(self, steps: Tensor) -> Tensor:
        """The rank's steps [N, padded / group_size] of the checkpoint's, [N, groups of the intermediate size]."""
        if self.group_size is None:
            return steps
        first = (self.start - self.front) // self.group_size
        groups = torch.arange(first, first + self.padded // self.group_size, device=steps.device) // self.repeats
        return steps[:, groups.clamp(max=steps.shape[1] - 1)]


def rank_share(columns: int, rank: int, group_size: int | None) -> RankShare:
    """Rank `rank`'s share, of `columns` columns like every other's, of a model whose groups are of `group_size`.

    The rank's groups are the largest that divide both, down to the smallest that kernels know.  Where not even that one
    divides the share, the share is widened by zeros to whole groups of that size; it is a multiple of 16 columns.
    """
    start = columns * rank
    if group_size is None:
        return RankShare(start, columns)
    fitting = (size for size in GROUP_SIZES if group_size % size == 0 and columns % size == 0)
    size = next(fitting, GROUP_SIZES[-1])
    return RankShare(start, columns, start % size, -(start + columns) % size, size, group_size // size)
