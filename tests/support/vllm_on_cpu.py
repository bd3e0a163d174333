"""Past what stops vLLM's CPU build beside the experts, so that every family is served where there is no GPU."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from puzzlemoe_vllm.format.fp8 import FP8_BLOCK, dequantize


def help_along() -> None:
    """Changes vLLM in this process; nothing on a GPU."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _route_by_sigmoid()
        _multiply_fp8()


def _route_by_sigmoid() -> None:
    """vLLM's CPU router asserts softmax scores where experts are in no groups, as those of MiniMax-M2.  All experts in
    one group are in none: the same router's grouped choice serves them."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    make = CPURouter.__init__

    def in_one_group(router: Any, **options: Any) -> None:
        if options["scoring_func"] == "sigmoid" and not options["use_grouped_topk"]:
            options |= {"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1}
        make(router, **options)

    CPURouter.__init__ = in_one_group


def _multiply_fp8() -> None:
    """vLLM's CPU kernels of linear layers in FP8 want AMX, and the first of them quantizes tokens as well: here such a
    layer multiplies by the bf16 that its weights stand for."""
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    class Dequantizing(linear.CPUFp8BlockScaledMMKernel):
        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            pass

        def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
            return F.linear(x, dequantize(layer.weight, layer.weight_scale_inv, (FP8_BLOCK, FP8_BLOCK)), bias)

    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU] = [Dequantizing]
