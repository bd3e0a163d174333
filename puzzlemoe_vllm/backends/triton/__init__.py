"""Triton, no build step: what serves on GPUs where the CUDA library is not built.

Words stay in the checkpoint's row-major order and are decoded in registers on the way to the tensor cores.  A layer is
five launches whose grids follow from shapes alone:

    count     tokens of every local expert, and each slot's rank among its expert's; a slot is one (token, k)
    align     slots in the order of experts, and the table of token blocks; counts for itself when slots are few
    gate_up   hidden = SiLU(gate x) * up x, one row per slot in that order
    down      one row per slot in the router's order, in parts when K is split
    combine   the sum over top-k, weighted by the router

The first two are in route.py, the others in gemm.py; decode.py turns words into weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puzzlemoe_vllm.backends import ExpertWeights
from puzzlemoe_vllm.backends.triton import gemm
from puzzlemoe_vllm.format.codes import get_code

READS_CHECKPOINT_ORDER = True
CALL_TOKENS = 16384
"""More are multiplied in several passes, which bounds the scratch memory."""


def unavailable(device: torch.device | None = None) -> str | None:
    """Why Triton's kernels cannot serve a device, the current GPU by default, or None when they can."""
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return f"{device or 'this machine'} is not a GPU"
    return None


def prepare(weights: ExpertWeights) -> None:
    """`fused_experts` reads the checkpoint's own order; only the table is fetched, which no graph capture could do."""
    get_code(weights.code).word_table(weights.w13_pairs.device)


def fused_experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, weights: ExpertWeights) -> Tensor:
    """sum_k topk_weights[m, k] * down(SiLU(gate x) * up x) over the local experts of row m.

    x: [M, H] bf16; topk_weights float32 [M, k]; topk_ids int [M, k].  Negative ids are skipped.
    Returns [M, H] bf16, equal bits for equal inputs; inputs are not written.  No host synchronisation.
    Raises TypeError when x or the words are not of the dtype that the kernels read.
    """
    code = get_code(weights.code)
    if x.dtype != torch.bfloat16 or weights.w13_dense.dtype != torch.bfloat16:
        raise TypeError(f"the Triton backend computes in bfloat16, not {x.dtype} by {weights.w13_dense.dtype}")
    if weights.w13_pairs.dtype != code.dtype:
        raise TypeError(f"{code.name} words are {code.dtype}, not {weights.w13_pairs.dtype}")
    x, topk_weights, topk_ids = x.contiguous(), topk_weights.contiguous(), topk_ids.contiguous()
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        for start in range(0, x.shape[0], CALL_TOKENS):
            part = slice(start, start + CALL_TOKENS)
            gemm.layer(x[part], topk_weights[part], topk_ids[part], weights, out[part])
    return out
