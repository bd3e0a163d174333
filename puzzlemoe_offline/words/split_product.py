"""Products of float32 matrices on a GPU's tensor cores, which multiply no float32."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 1 << 31
"""Multiplications up to which a product stays in float32: that is a tenth of a millisecond on an H100, and splitting
factors has eight kernels to launch."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """float32 [n, M, K] times [n, K, N] -> [n, M, N].

    A GPU takes each factor as the sum of two bf16 numbers, 16 bits together: the products of three of the four
    combinations are exact in float32, and the fourth is below the rest.  Tensor cores cut off what does not fit into
    their sums, so that long ones come out short: those of 14336 terms by up to 2e-4.
    """
    if not left.is_cuda or left[0].numel() * right.shape[2] <= SMALL:
        return left @ right
    (first, its_rest), (second, other_rest) = _split(left), _split(right)
    many, others = torch.cat([first, first, its_rest], dim=2), torch.cat([second, other_rest, second], dim=1)
    return torch.bmm(many, others, out_dtype=torch.float32)


def _split(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """What bf16 holds of float32 values, and of what is left of them."""
    held = matrices.bfloat16()
    return held, (matrices - held).bfloat16()
