"""What serves a layer's experts: the weights as a rank holds them, and what each module of this folder offers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

FP8_VARIABLE = "PUZZLEMOE_FP8_PREFILL"


@cache
def wants_fp8_prefill() -> bool:
    """Whether PUZZLEMOE_FP8_PREFILL asks for products in e4m3 where there are many tokens.  Raises ValueError for a
    value other than 0 and 1."""
    wanted = os.environ.get(FP8_VARIABLE, "0")
    if wanted not in ("0", "1"):
        raise ValueError(f"{FP8_VARIABLE}={wanted}: give 1, or unset it")
    return wanted == "1"


@dataclass(frozen=True)
class ExpertWeights:
    """The routed experts of one MoE layer on one rank: P pairs and D dense experts, hidden size H, intermediate size I.

    Local expert 2p + position is that position of pair p; local expert 2P + d is dense expert d.

    w13_pairs: words of the gate rows then the up rows, [P, 2I, H words].
    w2_pairs: words of the down projection, [P, H, I words].
    w13_dense, w2_dense: bf16 [D, 2I, H] and [D, H, I].
    expert_map: int32 [global experts], local expert id or -1 when it lives on another rank; None when all are local.
    code: name of the pair words' code (`puzzlemoe_vllm.format.codes`).
    w13_steps, w2_steps: bf16 steps [P, 2I, groups of H] and [P, H, groups of I]; None for codes without steps.
    """

    w13_pairs: Tensor
    w2_pairs: Tensor
    w13_dense: Tensor
    w2_dense: Tensor
    expert_map: Tensor | None
    code: str
    w13_steps: Tensor | None = None
    w2_steps: Tensor | None = None

    @property
    def merged(self) -> int:
        """Local experts that are stored in pairs."""
        return 2 * self.w13_pairs.shape[0]

    @property
    def total(self) -> int:
        """Local experts, merged and dense."""
        return self.merged + self.w13_dense.shape[0]


class Backend(Protocol):
    """A backend of the fused-experts op."""

    __name__: str

    READS_CHECKPOINT_ORDER: bool
    """Whether `prepare` leaves words and weights in the checkpoint's order."""

    def unavailable(self, device: torch.device | None = None) -> str | None:
        """Why it cannot serve a device, this machine's usual one by default, or None when it can."""

    def prepare(self, weights: ExpertWeights) -> None:
        """Rewrites a layer's weights, in place, into the order that its kernels read, once after loading."""

    def fused_experts(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, weights: ExpertWeights) -> Tensor:
        """sum_k topk_weights[m, k] * down(SiLU(gate x) * up x) over the local experts of row m, on prepared weights.

        x: bf16 [M, H]; topk_weights float32 [M, k]; topk_ids [M, k], below 0: skip.  Returns bf16 [M, H]; inputs are
        not written.
        """
