"""DeepSeek-MoE-16B (model_type `deepseek`), which transformers has no class for, on top of its Llama layers.

Only its own remote code would run it otherwise, and a checkpoint's code is never run here.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class DeepseekRouter(nn.Module):
    """Softmax router: top-k probabilities, renormalised when norm_topk_prob, times routed_scaling_factor."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.scale = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states [M, H] -> float32 weights and int64 expert ids, both [M, top_k]."""
        scores = F.linear(hidden_states.float(), self.weight.float()).softmax(dim=-1)
        weights, ids = scores.topk(self.top_k, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * self.scale, ids


class DeepseekMoe(nn.Module):
    """Routed experts (`experts` is put in by the layer-by-layer runner) plus the always-on shared experts."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate = DeepseekRouter(config)
        self.experts = nn.Identity()
        shared = copy.copy(config)
        shared.intermediate_size = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = LlamaMLP(shared)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        weights, ids = self.gate(tokens)
        routed: Tensor = self.experts(tokens, ids, weights).view(hidden_states.shape)
        shared: Tensor = self.shared_experts(hidden_states)
        return routed + shared


class DeepseekForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """Llama attention; every layer from first_k_dense_replace on, in steps of moe_layer_freq, is a MoE layer."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            if index >= config.first_k_dense_replace and index % config.moe_layer_freq == 0:
                layer.mlp = DeepseekMoe(config)


DEFAULTS = {"first_k_dense_replace": 0, "moe_layer_freq": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0}


def deepseek_config(config: dict[str, Any]) -> LlamaConfig:
    """The config.json of a `deepseek` model as a LlamaConfig with the MoE fields kept as attributes."""
    fields = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    return LlamaConfig.from_dict({**DEFAULTS, **fields})
