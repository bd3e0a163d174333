"""Plain torch, any device: what the kernels compute that multiply merged experts in e4m3.

Activations are quantised by row: a row's largest magnitude becomes 448, the largest e4m3.  So are the rows of hidden
activations, after they were rounded to bf16.  Weights are the code's own e4m3 values times their steps.  Products and
sums are exact, but for the rounding of float32 or float64; the tensor cores sum in fewer bits.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzlemoe_vllm.backends import ExpertWeights, reference
from puzzlemoe_vllm.format.codes import TableCode, get_code

LARGEST = torch.finfo(torch.float8_e4m3fn).max

SMALLEST = 2.0**-100
"""Of a row's largest magnitude; rows below are zeros, since float32 does not hold the inverse of every scale."""


def quantised(rows: Tensor) -> Tensor:
    """[M, K] rounded to e4m3 times a scale per row, in the dtype of the input."""
    largest = rows.abs().amax(dim=-1, keepdim=True).float()
    inverse = (LARGEST / largest).where(~(largest < SMALLEST), 0)  # NaN stays what it is
    bits = (rows.float() * inverse).to(torch.float8_e4m3fn)
    return bits.to(rows.dtype) * (largest / LARGEST).to(rows.dtype)


def decode(code: TableCode, words: Tensor, position: int, steps: Tensor) -> Tensor:
    """float64 weights [..., K] of one position, from words as stored and steps [..., groups].

    Raises ValueError for a code that has no e4m3 values.
    """
    if code.sums is None:
        raise ValueError(f"{code.name} has no values in e4m3")
    values = code.e4m3_values()[position].double().to(words.device)[code.unpack(words).long()]
    grouped = values.unflatten(-1, (steps.shape[-1], -1)) * code.sums.e4m3_unit
    weights: Tensor = (grouped * steps.double()[..., None]).flatten(-2)
    return weights


def expert_output(inputs: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """What an expert of decoded weights [2I, H] and [H, I] makes of tokens [m, H], in their dtype."""
    gate, up = F.linear(quantised(inputs), w13.to(inputs.dtype)).chunk(2, dim=-1)
    hidden = (F.silu(gate) * up).to(torch.bfloat16).to(inputs.dtype)
    return F.linear(quantised(hidden), w2.to(inputs.dtype))


def fused_experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, weights: ExpertWeights) -> Tensor:
    """sum_k topk_weights[m, k] * expert(x) over the local experts of row m; dense experts as in `reference`.

    x: [M, H] float32 or float64, of bf16 values; topk_weights float32 [M, k]; topk_ids int [M, k], below 0: skip.
    Returns [M, H] in x.dtype.  Raises ValueError for a code that has no e4m3 values.
    """
    code = get_code(weights.code)
    if not isinstance(code, TableCode) or weights.w13_steps is None or weights.w2_steps is None:
        raise ValueError(f"{weights.code} has no values in e4m3")
    ids = reference.local_ids(topk_ids, weights.expert_map)
    merged = ids < weights.merged
    dense_ids = ids.where(~merged, -1)
    out = torch.zeros_like(x)
    if bool((dense_ids >= 0).any()):
        out += reference.fused_experts(x, topk_weights, dense_ids, dataclasses.replace(weights, expert_map=None))
    for expert in ids.where(merged, -1).unique().tolist():
        if expert < 0:
            continue
        pair, position = expert >> 1, expert & 1
        w13, w2 = (
            decode(code, words[pair], position, steps[pair])
            for words, steps in ((weights.w13_pairs, weights.w13_steps), (weights.w2_pairs, weights.w2_steps))
        )
        rows, choice = (ids == expert).nonzero(as_tuple=True)
        down = expert_output(x[rows], w13, w2)
        out.index_add_(0, rows, down * topk_weights[rows, choice].to(x.dtype)[:, None])
    return out
