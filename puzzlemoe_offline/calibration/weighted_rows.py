"""Rows times the router's weights as a Triton kernel, for a GPU: torch's own product of two dtypes is slower than the
memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Columns of a row that a program multiplies."""


def weighted_rows(rows: Tensor, weights: Tensor) -> Tensor:
    """Rows [m, K] multiplied in float32 by weights [m]; in the rows' dtype, contiguous."""
    rows = rows.contiguous()
    out = torch.empty_like(rows)
    if len(rows):
        weighted_rows_kernel[(len(rows), triton.cdiv(rows.shape[1], BLOCK))](
            rows, weights.contiguous(), out, rows.shape[1], BLOCK=BLOCK
        )
    return out


@triton.jit
def weighted_rows_kernel(rows, weights, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    values = tl.load(rows + row * columns + column, mask=inside).to(tl.float32) * tl.load(weights + row)
    tl.store(out + row * columns + column, values.to(out.dtype.element_ty), mask=inside)
