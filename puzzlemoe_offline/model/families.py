"""The supported model families.  A new one is a row in the table, not a code path."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from puzzlemoe_vllm.errors import UserError, shown


class UnsupportedModel(UserError):
    """A model that the tool cannot compress; the text lists what it can."""


@dataclass(frozen=True)
class Family:
    """How a family names its MoE layers on disk and in config.json.

    block: the MoE block's name inside a decoder layer; gate, up, down: an expert's projections.
    experts: the config.json keys that may hold the expert count, the family's own first; intermediate: the key of an
    expert's intermediate size.  remote_config: vLLM has the model, but reads config.json with code of the checkpoint.
    """

    title: str
    block: str
    gate: str
    up: str
    down: str
    experts: tuple[str, ...]
    intermediate: str
    remote_config: bool = False

    @property
    def projections(self) -> tuple[str, str, str]:
        """Names of the gate, up and down projection."""
        return self.gate, self.up, self.down

    def experts_key(self, config: dict[str, Any]) -> str:
        """The key that holds the expert count in this config.json; the family's own when none does."""
        return next((key for key in self.experts if key in config), self.experts[0])


def _mlp(title: str, experts: tuple[str, ...], intermediate: str = "moe_intermediate_size") -> Family:
    return Family(title, "mlp", "gate_proj", "up_proj", "down_proj", experts, intermediate)


FAMILIES = {
    "mixtral": Family("Mixtral", "block_sparse_moe", "w1", "w3", "w2", ("num_local_experts",), "intermediate_size"),
    # The second key is what transformers writes when it saves a model again.
    "qwen3_moe": _mlp("Qwen3-MoE", ("num_experts", "num_local_experts")),
    "qwen2_moe": _mlp("Qwen2-MoE / Qwen1.5-MoE", ("num_experts",)),
    "deepseek_v2": _mlp("DeepSeek-V2", ("n_routed_experts",)),
    "deepseek": replace(_mlp("DeepSeek-MoE", ("n_routed_experts",)), remote_config=True),
    "olmoe": _mlp("OLMoE", ("num_experts",), "intermediate_size"),
}
"""Rows by config.json's model_type."""


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json.  Raises UnsupportedModel, listing the families, or for experts without SiLU."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(f"{family.title} ({name})" for name, family in FAMILIES.items())
        raise UnsupportedModel(
            f"model_type {shown(repr(model_type), 60)} is not supported; supported families: {known}"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModel(
            f"hidden_act {shown(repr(config['hidden_act']), 60)} is not supported: experts must be SiLU-gated"
        )
    return FAMILIES[model_type]


def expert_groups(config: dict[str, Any]) -> int:
    """Number of expert groups that the router picks from (group-limited routing), 1 without groups.

    Whatever topk_method says: vLLM heeds n_group alone.  Raises UnsupportedModel for what is no number of groups.
    """
    groups = config.get("n_group")
    if groups is None:
        return 1
    if type(groups) is not int or groups < 0:
        raise UnsupportedModel(f"n_group is {shown(repr(groups), 60)} in config.json, expected a number: copy it again")
    return groups or 1
