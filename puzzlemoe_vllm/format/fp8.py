"""FP8 weights, E4M3, with a scale for each block: what linear layers outside routed experts may be stored in."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

FP8_BLOCK = 128
"""Rows, and columns, of a weight that share a scale in packed models, as in DeepSeek-V3's."""

FP8_SCALE = "weight_scale_inv"
"""Suffix of a weight's scales, float32 [ceil(N / 128), ceil(K / 128)], which its blocks are multiplied by.  The name,
which says the opposite, is DeepSeek-V3's."""

LARGEST = 448.0
"""Of E4M3."""


def scales_name(weight: str) -> str:
    """Name of the scales of a weight `....weight`."""
    return f"{weight.removesuffix('weight')}{FP8_SCALE}"


def scale_shape(shape: tuple[int, ...], block: tuple[int | None, int | None]) -> tuple[int, ...]:
    """Shape of the scales of weights [..., N, K]; block: rows and columns that share one, None for all of them."""
    parts = zip(shape[-2:], block, strict=True)
    return (*shape[:-2], *(1 if part is None else ceil(size / part) for size, part in parts))


def dequantize(weights: Tensor, scales: Tensor, block: tuple[int | None, int | None]) -> Tensor:
    """bf16 of FP8 weights [..., N, K]: the products with their scales, rounded once.

    scales: any float of the shape that `scale_shape` says, or with as many entries.
    """
    spread = scales.float().reshape(scale_shape(tuple(weights.shape), block))
    for dimension, part in ((-1, block[1]), (-2, block[0])):
        if part is not None:
            spread = spread.repeat_interleave(part, dimension).narrow(dimension, 0, weights.shape[dimension])
    return weights.float().mul_(spread).bfloat16()


def quantize(weights: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 and float32 scales of weights [N, K], both multiples of `FP8_BLOCK`: a block's largest magnitude becomes the
    largest of E4M3, as in vLLM's own quantization."""
    rows, columns = (size // FP8_BLOCK for size in weights.shape)
    blocks = weights.float().reshape(rows, FP8_BLOCK, columns, FP8_BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / LARGEST
    scales = torch.where(scales > 0, scales, 1.0)
    divided = (blocks / scales[:, None, :, None]).clamp(-LARGEST, LARGEST)
    return divided.to(torch.float8_e4m3fn).reshape(weights.shape), scales
