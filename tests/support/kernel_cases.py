"""A layer and a kernel of the CUDA library that multiplies its words, and what that must give; on a GPU."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from support.layers import Layer, copied, generator, random_inputs, random_weights
from torch import Tensor

from puzzlemoe_vllm.backends import ExpertWeights, cuda, reference, reference_fp8
from puzzlemoe_vllm.format.codes import get_code

REASON = cuda.unavailable()
"""Why the library cannot be used here, None when it can."""

TOLERANCE = 5e-3
"""Hidden activations, expert outputs and the result are rounded to bf16: 2^-9 each at most."""

STEP_TOLERANCE = 8e-3
"""With steps: kernels for few tokens multiply sums by them, which leaves out the rounding of each weight."""

FP8_TOLERANCE = 2.5e-2
"""Tensor cores sum e4m3 products in about 14 bits, and what that changes of a hidden activation may round to another
e4m3 value, an eighth away: 1.4e-2 of the outputs at 2048 columns, 2.1e-2 at 7168; a few tokens may have twice their
share of that.  Quantising itself changes outputs by 6e-2."""

FEW = 64
"""Tokens below which such roundings do not average out."""

Inputs = tuple[Tensor, Tensor, Tensor]
"""x, topk_weights, topk_ids."""


@functools.lru_cache(maxsize=1)
def weights_of(layer: Layer) -> tuple[ExpertWeights, ExpertWeights]:
    """The same random layer as loaded and as prepared for the kernels."""
    loaded = random_weights(layer, generator(0, "cuda"))
    prepared = copied(loaded)
    cuda.prepare(prepared)
    return loaded, prepared


@functools.cache
def draw() -> torch.Generator:
    """Of all inputs, no two alike."""
    return generator(1, "cuda")


def poison() -> None:
    """Fills the allocator's free memory with NaN, so that scratch or outputs left unwritten show."""
    torch.cuda.synchronize()
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in (1 << 24, 1 << 20, 1 << 16, 1 << 12, 1 << 8)]
    del blocks


def distance(out: Tensor, expected: Tensor) -> float:
    """||difference|| / ||expected||; NaN fails every comparison."""
    return ((out.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@dataclass(frozen=True)
class Case:
    """A kernel, and the layer that it multiplies; fp8: in e4m3, but for dense experts.  Without a kernel, the dispatch
    table chooses."""

    layer: Layer
    kernel: str | None = None
    fp8: bool = False

    def __str__(self) -> str:
        layer = self.layer
        sizes = f"{layer.pairs}+{layer.dense} {layer.hidden}x{layer.intermediate}"
        return " ".join(map(str, (layer.code, layer.group_size, sizes, self.kernel)))

    def tolerance(self, tokens: int) -> float:
        """Of the relative error of the output for so many tokens."""
        if self.fp8:
            return FP8_TOLERANCE if tokens >= FEW else 2 * FP8_TOLERANCE
        return TOLERANCE if self.layer.group_size is None else STEP_TOLERANCE

    def inputs(self, tokens: int, experts: int | None = None) -> Inputs:
        return random_inputs(self.layer, tokens, draw(), experts)

    def weights(self, expert_map: Tensor | None = None) -> tuple[ExpertWeights, ExpertWeights]:
        """The layer's, as loaded and as prepared."""
        loaded, prepared = weights_of(self.layer)
        return dataclasses.replace(loaded, expert_map=expert_map), dataclasses.replace(prepared, expert_map=expert_map)

    def multiply(self, inputs: Inputs, expert_map: Tensor | None = None) -> Tensor:
        return cuda.fused_experts(*inputs, self.weights(expert_map)[1], kernel=self.kernel)

    def expected(self, inputs: Inputs, expert_map: Tensor | None = None) -> Tensor:
        """By the float64 reference of the kernel's arithmetic."""
        x, *routing = inputs
        truth = reference_fp8 if self.fp8 else reference
        return truth.fused_experts(x.double(), *routing, self.weights(expert_map)[0])

    def error(self, out: Tensor, inputs: Inputs, expert_map: Tensor | None = None) -> float:
        return distance(out, self.expected(inputs, expert_map))

    def check(self, inputs: Inputs, expert_map: Tensor | None = None) -> None:
        poison()
        copies = [tensor.clone() for tensor in inputs]
        error = self.error(self.multiply(inputs, expert_map), inputs, expert_map)
        assert error < self.tolerance(len(inputs[0])), f"relative error {error:.4f}"
        assert all(torch.equal(before, after) for before, after in zip(copies, inputs, strict=True))


def kernels(code: str, fp8: bool = False) -> list[str]:
    """Those that multiply words of a code here; none where the library cannot be used."""
    return [] if REASON else cuda.runnable_kernels(torch.device("cuda"), get_code(code), fp8)


def cases(*layers: Layer, fp8: bool = False) -> list[Case]:
    """Every layer with every kernel that multiplies its words, in bf16 or in e4m3."""
    return [Case(layer, kernel, fp8) for layer in layers for kernel in kernels(layer.code, fp8)]
