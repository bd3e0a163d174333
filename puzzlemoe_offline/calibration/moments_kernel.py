"""Second moments of all experts' inputs in one Triton kernel, for a GPU.

Half of a symmetric matrix is half of the work, and experts that saw few tokens do not keep the others waiting.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK, TOKENS, WARPS, STAGES = 128, 64, 8, 3
"""Columns of a tile, tokens of a step, warps and steps in flight of one program."""

OPERAND = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)
"""The interpreter multiplies no bf16."""


def add_moments(moments: Tensor, rows: Tensor, starts: Tensor, first: int, every: int) -> None:
    """Adds X'X of the rows of experts `first`, `first + every`, ... to float32 moments [n, K, K], in place.

    rows: bf16 [m, K], contiguous, those of each expert after those of the one before; starts: int32 [experts + 1].
    Products of bf16 are exact in float32, and so they are added up.
    """
    count, columns, _ = moments.shape
    tiles = triton.cdiv(columns, BLOCK)
    add_moments_kernel[(tiles, tiles, count)](
        moments,
        rows,
        starts,
        columns,
        first,
        every,
        BLOCK=BLOCK,
        TOKENS=TOKENS,
        num_warps=WARPS,
        num_stages=STAGES,
    )


@triton.jit
def add_moments_kernel(
    moments, rows, starts, columns, first, every, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    left, right = tl.program_id(0), tl.program_id(1)
    if right > left:
        return
    place = tl.program_id(2)
    begin = tl.load(starts + first + place * every)
    end = tl.load(starts + first + place * every + 1)
    i, j = left * BLOCK + tl.arange(0, BLOCK), right * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(begin, end, TOKENS):
        token = (start + tl.arange(0, TOKENS)).to(tl.int64)
        inside = token < end
        turned = tl.load(
            rows + token[None, :] * columns + i[:, None], mask=inside[None, :] & (i < columns)[:, None], other=0.0
        )
        straight = tl.load(
            rows + token[:, None] * columns + j[None, :], mask=inside[:, None] & (j < columns)[None, :], other=0.0
        )
        total = tl.dot(turned.to(OPERAND), straight.to(OPERAND), total)
    both = (i < columns)[:, None] & (j < columns)[None, :]
    matrix = moments + place.to(tl.int64) * columns * columns
    here = matrix + i[:, None] * columns + j[None, :]
    total += tl.load(here, mask=both, other=0.0)
    tl.store(here, total, mask=both)
    if left != right:
        tl.store(matrix + j[:, None] * columns + i[None, :], tl.trans(total), mask=tl.trans(both))
