"""The one op `puzzlemoe::fused_experts`, and the choice of its backend.

The backend is chosen inside the op, where torch.compile does not look; a choice that it traced would be fixed.
"""

from __future__ import annotations

import logging
import os
from functools import cache

import torch
from torch import Tensor

from puzzlemoe_vllm.backends import FP8_VARIABLE, Backend, ExpertWeights, wants_fp8_prefill
from puzzlemoe_vllm.format.codes import PairCode

logger = logging.getLogger(__name__)

BACKENDS = ("cuda", "triton", "reference")
VARIABLE = "PUZZLEMOE_BACKEND"

# Kept alive for the life of the process: the op is gone when its library is.
_library = torch.library.Library("puzzlemoe", "FRAGMENT")
_library.define(
    "fused_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor w13_pairs, Tensor w2_pairs, "
    "Tensor w13_dense, Tensor w2_dense, Tensor? expert_map, str code, "
    "Tensor? w13_steps=None, Tensor? w2_steps=None) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


@cache
def backend_for(device_type: str) -> Backend:
    """The backend that serves tensors of a device type, `cuda` or `cpu`.

    PUZZLEMOE_BACKEND names one; otherwise a CPU gets the reference, and a GPU the CUDA library, or Triton (with one log
    line that says why) where the library is not there.  Raises ValueError for an unknown or unusable choice.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted is not None and wanted not in BACKENDS:
        raise ValueError(f"{VARIABLE}={wanted}: choose one of {', '.join(BACKENDS)}")
    if device_type == "cpu":
        if wanted in ("cuda", "triton"):
            raise ValueError(f"{VARIABLE}={wanted}, but the model is on the CPU: unset it or use a GPU")
        return _load("reference")
    backend = _load(wanted or "cuda")
    problem = backend.unavailable()
    if problem is None:
        return backend
    if wanted is not None:
        raise ValueError(f"{VARIABLE}={wanted}: {problem}")
    logger.warning("puzzlemoe: using the Triton kernels, which are slower: %s", problem)
    return _load("triton")


def check_backend(device_type: str, eager: bool, code: PairCode) -> None:
    """Raises ValueError when no backend can serve words of a code on a device, or only without the CUDA graphs that
    vLLM is to make, or not in FP8 where that is asked for."""
    backend = backend_for(device_type)
    if wants_fp8_prefill():
        _check_fp8(backend, code)
    if device_type != "cpu" and backend is _load("reference") and not eager:
        raise ValueError(
            f"{VARIABLE}=reference cannot be captured in CUDA graphs: add --enforce-eager, or unset {VARIABLE}"
        )


def _check_fp8(backend: Backend, code: PairCode) -> None:
    name = backend.__name__.rsplit(".", 1)[1]
    why: str | None = f"the {name} backend has no kernels for e4m3"
    if name == "cuda":
        from puzzlemoe_vllm.backends import cuda

        why = cuda.why_no_fp8(code)
    if why:
        raise ValueError(f"{FP8_VARIABLE}=1: {why}: unset it")


def _load(name: str) -> Backend:
    """Imports one backend and no other."""
    if name == "cuda":
        from puzzlemoe_vllm.backends import cuda

        return cuda
    if name == "triton":
        from puzzlemoe_vllm.backends import triton

        return triton
    from puzzlemoe_vllm.backends import reference

    return reference


def _fused_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w13_pairs: Tensor,
    w2_pairs: Tensor,
    w13_dense: Tensor,
    w2_dense: Tensor,
    expert_map: Tensor | None,
    code: str,
    w13_steps: Tensor | None = None,
    w2_steps: Tensor | None = None,
) -> Tensor:
    weights = ExpertWeights(w13_pairs, w2_pairs, w13_dense, w2_dense, expert_map, code, w13_steps, w2_steps)
    if not weights.total:
        # An expert-parallel rank without experts, or none of whose experts is the centre of a cluster.
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    return backend_for(x.device.type).fused_experts(x, topk_weights, topk_ids, weights)


_library.impl("fused_experts", _fused_experts, "CPU")
_library.impl("fused_experts", _fused_experts, "CUDA")


def _fake(x: Tensor, *args: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


torch.library.register_fake("puzzlemoe::fused_experts", _fake, lib=_library)


def fused_experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, weights: ExpertWeights) -> Tensor:
    """x [M, H] through its routed experts, as `backends.reference.fused_experts` defines it; one call of the op."""
    out: Tensor = torch.ops.puzzlemoe.fused_experts(
        x,
        topk_weights,
        topk_ids,
        weights.w13_pairs,
        weights.w2_pairs,
        weights.w13_dense,
        weights.w2_dense,
        weights.expert_map,
        weights.code,
        weights.w13_steps,
        weights.w2_steps,
    )
    return out
