"""Whether the kernels that a device would be served by give right products there: a small layer of every code, and of
every number of columns that may share a step.

Users compile the library with their own nvcc, and a driver may translate PTX for a GPU that no test has seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from puzzlemoe_vllm.backends import ExpertWeights, reference, reference_fp8
from puzzlemoe_vllm.format.codes import CODES, GROUP_SIZES, PairCode

SIZES: dict[int | None, tuple[int, int]] = {None: (160, 96), 32: (160, 96), 64: (192, 320), 128: (256, 384)}
"""Hidden and intermediate size, by group size: whole groups, and no whole tiles where groups leave a choice."""

TOPK = 2
TOKENS = (3, 70)
"""Few, and more than one part of most kernels."""

TOLERANCE = 2e-2
"""Of the relative error.  bf16 roundings make 5e-3; one wrong row of a tile makes more than this."""

FP8_TOLERANCE = 4e-2
"""The same in e4m3, of which tensor cores keep fewer bits of a sum."""


def random_words(code: PairCode, pairs: int, rows: int, columns: int, draw: torch.Generator) -> Tensor:
    """Stored words of pairs of [rows, columns] matrices, where the generator is; 16-bit ones with the exponents of
    usual weights."""
    shape = (pairs, *code.words_shape(rows, columns))
    words = torch.randint(0, 1 << 16, shape, generator=draw, dtype=torch.int32, device=draw.device)
    if code.has_steps:
        return (words & 0xFF).to(torch.uint8)
    return ((words & 0xF07F) | ((words >> 7 & 3) + 6 << 7)).to(torch.int16)


def small_layer(code: PairCode, group_size: int | None, draw: torch.Generator) -> ExpertWeights:
    """One pair and one dense expert, on the CPU, as they would be loaded."""

    def steps(rows: int, columns: int) -> Tensor | None:
        if group_size is None:
            return None
        step = torch.rand(1, rows, columns // group_size, generator=draw, dtype=torch.float32, device="cpu")
        return step.add(0.5).mul(columns**-0.5).to(torch.bfloat16)

    def dense(rows: int, columns: int) -> Tensor:
        weights = torch.randn(1, rows, columns, generator=draw, dtype=torch.float32, device="cpu")
        return weights.mul(columns**-0.5).to(torch.bfloat16)

    hidden, intermediate = SIZES[group_size]
    w13, w2 = (2 * intermediate, hidden), (hidden, intermediate)
    return ExpertWeights(
        w13_pairs=random_words(code, 1, *w13, draw),
        w2_pairs=random_words(code, 1, *w2, draw),
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


def random_inputs(tokens: int, layer: ExpertWeights, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x, topk_weights and topk_ids, on the CPU."""
    x = torch.randn(tokens, layer.w13_dense.shape[2], generator=draw, dtype=torch.float32, device="cpu")
    scores = torch.rand(tokens, layer.total, generator=draw, dtype=torch.float32, device="cpu")
    topk_weights, topk_ids = scores.topk(TOPK)
    return x.to(torch.bfloat16), topk_weights, topk_ids


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's work on the CPU is this thread's alone.  The reference of a small layer is done sooner than many threads
    have begun, and where other processes hold the cores, each of its steps would wait for the last of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
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
        for group_size in GROUP_SIZES if code.has_steps else (None,):
            loaded = small_layer(code, group_size, draw)
            prepared = on_device(loaded, device)
            prepare(prepared)
            for tokens in TOKENS:
                inputs = random_inputs(tokens, loaded, draw)
                multiply = partial(fused_experts, *(tensor.to(device) for tensor in inputs), prepared)
                for truth, tolerance, names in (
                    (reference.fused_experts, TOLERANCE, kernels(code)),
                    (reference_fp8.fused_experts, FP8_TOLERANCE, fp8_kernels(code)),
                ):
                    if names and (fault := _fault_of(multiply, names, truth, tolerance, inputs, loaded)):
                        return fault
    return None


def _fault_of(
    multiply: Callable[..., Tensor],
    kernels: Iterable[str],
    truth: Callable[..., Tensor],
    tolerance: float,
    inputs: tuple[Tensor, Tensor, Tensor],
    layer: ExpertWeights,
) -> str | None:
    """What is wrong with the first kernel with which `multiply` does not give what `truth` gives of a layer."""
    x, *routing = inputs
    expected = truth(x.double(), *routing, layer)
    for kernel in sorted(kernels):
        try:
            out = multiply(kernel=kernel).double().cpu()
        except RuntimeError as reason:
            return f"{kernel} fails: {reason}"
        error = ((out - expected).norm() / expected.norm()).item()
        if not error < tolerance:
            return f"{kernel} gives wrong products of {layer.code} words, relative error {error:.2g}"
    return None
