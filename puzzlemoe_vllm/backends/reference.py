"""Plain torch, any device: the truth that kernels are tested against, and what serves on a CPU.

Only experts that some token chose are decoded, one at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzlemoe_vllm.backends import ExpertWeights
from puzzlemoe_vllm.format.codes import get_code

READS_CHECKPOINT_ORDER = True


def unavailable(device: torch.device | None = None) -> str | None:
    """None: it serves any device."""
    return None


def prepare(weights: ExpertWeights) -> None:
    """Nothing to do: this backend reads the checkpoint's own order."""


def expert_weights(weights: ExpertWeights, expert: int) -> tuple[Tensor, Tensor]:
    """bf16 ([2I, H], [H, I]) of one local expert."""
    if expert >= weights.merged:
        row = expert - weights.merged
        return weights.w13_dense[row], weights.w2_dense[row]
    code, pair, position = get_code(weights.code), expert >> 1, expert & 1
    w13, w2 = (
        code.decode(words[pair], position, None if steps is None else steps[pair])
        for words, steps in ((weights.w13_pairs, weights.w13_steps), (weights.w2_pairs, weights.w2_steps))
    )
    return w13, w2


def local_ids(topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """Local expert ids [M, k]; -1 for padding and for experts of other ranks."""
    ids = topk_ids.long()
    if expert_map is not None:
        ids = expert_map.long()[ids.clamp(min=0)].where(ids >= 0, -1)
    return ids


def fused_experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, weights: ExpertWeights) -> Tensor:
    """sum_k topk_weights[m, k] * down(SiLU(gate x) * up x) over the local experts of row m.

    x: [M, H] bf16 (or float32/float64 for a more exact reference); topk_weights float32 [M, k]; topk_ids int [M, k].
    Negative ids are skipped.  Returns [M, H] in x.dtype; inputs are not written.
    """
    ids = local_ids(topk_ids, weights.expert_map)
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.zeros(x.shape, dtype=accumulate, device=x.device)
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        w13, w2 = expert_weights(weights, expert)
        rows, choice = (ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[rows], w13.to(x.dtype)).chunk(2, dim=-1)
        hidden = F.silu(gate.to(accumulate)) * up.to(accumulate)
        down = F.linear(hidden.to(x.dtype), w2.to(x.dtype)).to(accumulate)
        out.index_add_(0, rows, down * topk_weights[rows, choice].to(accumulate)[:, None])
    return out.to(x.dtype)
