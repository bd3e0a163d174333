"""Whether the kernels that a device would be served by give right products there: one small layer of every code.

Users compile the library with their own nvcc, and a driver may translate PTX for a GPU that no test has seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from puzzlemoe_vllm.backends import ExpertWeights, reference, reference_fp8
from puzzlemoe_vllm.format.codes import CODES, PairCode

HIDDEN, INTERMEDIATE, GROUP_SIZE, TOPK = 160, 96, 32, 2
TOKENS = (3, 70)
"""Few, and more than one part of most kernels."""

TOLERANCE = 2e-2
"""Of the relative error.  bf16 roundings make 5e-3; one wrong row of a tile makes more than this."""

FP8_TOLERANCE = 4e-2
"""The same in e4m3, of which tensor cores keep fewer bits of a sum."""


def _words(code: PairCode, rows: int, columns: int, draw: torch.Generator) -> Tensor:
    """Stored words of one pair; 16-bit ones with the exponents of usual weights."""
    shape = (1, *code.words_shape(rows, columns))
    words = torch.randint(0, 1 << 16, shape, generator=draw, dtype=torch.int32, device="cpu")
    if code.has_steps:
        return (words & 0xFF).to(torch.uint8)
    return ((words & 0xF07F) | ((words >> 7 & 3) + 6 << 7)).to(torch.int16)


def small_layer(code: PairCode, draw: torch.Generator) -> ExpertWeights:
    """One pair and one dense expert, on the CPU, as they would be loaded."""

    def steps(rows: int, columns: int) -> Tensor | None:
        if not code.has_steps:
            return None
        step = torch.rand(1, rows, columns // GROUP_SIZE, generator=draw, dtype=torch.float32, device="cpu")
        return step.add(0.5).mul(columns**-0.5).to(torch.bfloat16)

    def dense(rows: int, columns: int) -> Tensor:
        weights = torch.randn(1, rows, columns, generator=draw, dtype=torch.float32, device="cpu")
        return weights.mul(columns**-0.5).to(torch.bfloat16)

    w13, w2 = (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    return ExpertWeights(
        w13_pairs=_words(code, *w13, draw),
        w2_pairs=_words(code, *w2, draw),
        w13_dense=dense(*w13),
        w2_dense=dense(*w2),
        expert_map=None,
        code=code.name,
        w13_steps=steps(*w13),
        w2_steps=steps(*w2),
    )


def on_device(weights: ExpertWeights, device: torch.device) -> ExpertWeights:
    """A copy of a layer."""
    tensors: dict[str, Any] = {
        name: value.to(device) for name, value in vars(weights).items() if isinstance(value, Tensor)
    }
    return dataclasses.replace(weights, **tensors)


def find_fault(
    device: torch.device,
    kernels: Callable[[PairCode], Iterable[str]],
    fp8_kernels: Callable[[PairCode], Iterable[str]],
    prepare: Callable[[ExpertWeights], None],
    fused_experts: Callable[..., Tensor],
) -> str | None:
    """What is wrong with the first kernel that fails, or None when all of them give what the reference gives.

    kernels: those that serve a code; fp8_kernels: those that multiply its words in e4m3.  prepare, fused_experts: the
    backend's, which are given a layer on `device`.
    """
    draw = torch.Generator("cpu").manual_seed(0)
    for code in CODES.values():
        loaded = small_layer(code, draw)
        prepared = on_device(loaded, device)
        prepare(prepared)
        for tokens in TOKENS:
            x = torch.randn(tokens, HIDDEN, generator=draw, dtype=torch.float32, device="cpu").to(torch.bfloat16)
            scores = torch.rand(tokens, loaded.total, generator=draw, dtype=torch.float32, device="cpu")
            topk_weights, topk_ids = scores.topk(TOPK)
            inputs = [tensor.to(device) for tensor in (x, topk_weights, topk_ids)]
            for truth, tolerance, names in (
                (reference, TOLERANCE, sorted(kernels(code))),
                (reference_fp8, FP8_TOLERANCE, sorted(fp8_kernels(code))),
            ):
                if not names:
                    continue
                expected = truth.fused_experts(x.double(), topk_weights, topk_ids, loaded)
                for kernel in names:
                    try:
                        out = fused_experts(*inputs, prepared, kernel=kernel).double().cpu()
                    except RuntimeError as reason:
                        return f"{kernel} fails: {reason}"
                    error = ((out - expected).norm() / expected.norm()).item()
                    if not error < tolerance:
                        return f"{kernel} gives wrong products of {code.name} words, relative error {error:.2g}"
    return None
