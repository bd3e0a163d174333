"""Products of float32 matrices on a GPU's tensor cores, which multiply no float32.

Each factor is taken as the sum of two bf16 numbers, 16 bits together: the products of three of the four combinations
are exact in float32, and the fourth is below the rest.  The three stand one after another in the depth of one product.
Tensor cores cut off what does not fit into their sums, so that long ones come out short: those of 14336 terms by up to
2e-4.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 1 << 31
"""Multiplications up to which a product stays in float32: that is a tenth of a millisecond on an H100, and splitting
factors has six kernels to launch."""

BLOCK = 2048
"""Rows or columns of a triangular factor that are multiplied together, with no more of the depth than is not zero for
all of them."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """float32 [n, M, K] times [n, K, N] -> [n, M, N]."""
    if _stays(left, right):
        return left @ right
    depth = left.shape[2]
    return _multiplied(_left_parts(left, depth), _right_parts(right, depth))


def times_upper(left: Tensor, upper: Tensor) -> Tensor:
    """float32 [n, M, K] times upper triangular [n, K, K] -> [n, M, K]."""
    if _stays(left, upper):
        return left @ upper
    parts, others = _left_parts(left, BLOCK), _right_parts(upper, BLOCK)
    found = [
        _multiplied(parts[:, :, : 3 * end], others[:, : 3 * end, start:end]) for start, end in _blocks(left.shape[2])
    ]
    return torch.cat(found, dim=2)


def times_upper_transposed(left: Tensor, upper: Tensor) -> Tensor:
    """float32 [n, M, K] times the transpose of upper triangular [n, K, K] -> [n, M, K]."""
    if _stays(left, upper):
        return left @ upper.mT
    parts, others = _left_parts(left, BLOCK), _right_parts(upper.mT, BLOCK)
    found = [
        _multiplied(parts[:, :, 3 * start :], others[:, 3 * start :, start:end])
        for start, end in _blocks(left.shape[2])
    ]
    return torch.cat(found, dim=2)


def upper_times(upper: Tensor, right: Tensor) -> Tensor:
    """Upper triangular float32 [n, K, K] times [n, K, N] -> [n, K, N]."""
    if _stays(upper, right):
        return upper @ right
    parts, others = _left_parts(upper, BLOCK), _right_parts(right, BLOCK)
    found = [
        _multiplied(parts[:, start:end, 3 * start :], others[:, 3 * start :]) for start, end in _blocks(upper.shape[2])
    ]
    return torch.cat(found, dim=1)


def _stays(left: Tensor, right: Tensor) -> bool:
    """Whether a product stays in float32."""
    return not left.is_cuda or left[0].numel() * right.shape[2] <= SMALL


def _blocks(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]


def _multiplied(parts: Tensor, others: Tensor) -> Tensor:
    product: Tensor = torch.bmm(parts, others, out_dtype=torch.float32)
    return product


def _left_parts(matrices: Tensor, block: int) -> Tensor:
    """float32 [n, M, K] -> bf16 [n, M, 3 * K]: of every `block` columns what bf16 holds, twice, and what it holds of
    the rest."""
    if matrices.stride(1) == 1:  # so that memory is read as it lies
        return _laid_out(matrices.mT, 1, block, (0, 1), 2).mT
    return _laid_out(matrices, 2, block, (0, 1), 2)


def _right_parts(matrices: Tensor, block: int) -> Tensor:
    """float32 [n, K, N] -> bf16 [n, 3 * K, N]: of every `block` rows the parts that meet those of `_left_parts`."""
    if matrices.stride(1) == 1:
        return _laid_out(matrices.mT, 2, block, (0, 2), 1).mT
    return _laid_out(matrices, 1, block, (0, 2), 1)


def _laid_out(matrices: Tensor, depth: int, block: int, held: tuple[int, int], rest: int) -> Tensor:
    """bf16, thrice as deep: of each block of the dimension `depth`, at two of three places what bf16 holds, and at the
    third what bf16 holds of the rest."""
    shape = [*matrices.shape]
    shape[depth] *= 3
    out = torch.empty(shape, dtype=torch.bfloat16, device=matrices.device)
    for start in range(0, matrices.shape[depth], block):
        piece = matrices.narrow(depth, start, min(block, matrices.shape[depth] - start))
        size = piece.shape[depth]
        places = out.narrow(depth, 3 * start, 3 * size).unflatten(depth, (3, size)).unbind(depth)
        first, second = (places[place] for place in held)
        second.copy_(first.copy_(piece))
        torch.sub(piece, first, out=places[rest])
    return out
