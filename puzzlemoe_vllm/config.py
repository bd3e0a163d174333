"""The quantization method `puzzlemoe`, as vLLM asks for it.  Importing this registers it with vLLM."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from puzzlemoe_vllm.format.files import read_json_object
from puzzlemoe_vllm.format.fp8 import FP8_BLOCK
from puzzlemoe_vllm.format.layout import (
    EXPERT_COUNTS,
    QUANT_METHOD,
    LayoutError,
    PuzzleConfig,
    decoder_layer,
    parse_config,
)
from puzzlemoe_vllm.served_files import ServedFiles, wants_digests

logger = init_logger(__name__)

FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
}
"""Linear layers that vLLM makes of several, for models that do not say so."""

ROUTING = (
    "num_experts_per_tok",
    "moe_k",
    "moe_topk",
    "norm_topk_prob",
    "scoring_func",
    "routed_scaling_factor",
    "topk_method",
    "n_group",
    "topk_group",
)
"""Keys of a model's config that decide which experts a token gets, and how they are weighted."""


@register_quantization_config(QUANT_METHOD)
class PuzzleMoEConfig(QuantizationConfig):
    """`quantization_config` of a packed model's config.json; other layers keep vLLM's stock methods."""

    def __init__(self, layout: PuzzleConfig):
        super().__init__()
        self.layout = layout
        self.files = ServedFiles(layout)
        self.fp8_layers = frozenset(layout.fp8)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PuzzleMoEConfig:
        """Raises LayoutError for a version, code or field that this plugin does not know."""
        return cls(parse_config(config))

    @classmethod
    def get_name(cls) -> str:
        """The name after `--quantization`."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """bf16 only: a decoded 16-bit word is a bf16, and its range does not fit fp16."""
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """sm_80: bf16 tensor cores."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Where vLLM looks when config.json has no quantization_config; its error then names this file."""
        return ["puzzlemoe_config.json"]

    def maybe_update_config(self, model_name: str, hf_config: Any = None, **kwargs: Any) -> None:
        """Raises LayoutError when pairs or clusters do not fit the model's number of experts or layers, or a local
        folder's headers are not those that were written.  Warns of routing other than the model was compressed with.
        """
        wants_digests()
        text = getattr(hf_config, "text_config", hf_config)
        experts = next((count for key in EXPERT_COUNTS if (count := getattr(text, key, None))), None)
        layers = getattr(text, "num_hidden_layers", None)
        for layer, merged in self.layout.merged_experts.items():
            if (experts is not None and merged > experts) or (layers is not None and layer >= layers):
                raise LayoutError(
                    f"{model_name}: quantization_config merges {merged} experts of layer {layer}, but the model has "
                    f"{layers} layers of {experts} experts: config.json was edited or belongs to another model"
                )
        for layer, centres in self.layout.clusters.items():
            if (experts is not None and len(centres) != experts) or (layers is not None and layer >= layers):
                raise LayoutError(
                    f"{model_name}: quantization_config has clusters of {len(centres)} experts in layer {layer}, but "
                    f"the model has {layers} layers of {experts}: config.json was edited or belongs to another model"
                )

        self.files.check_at_start(model_name)
        _warn_of_other_routing(model_name, text)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Our method for routed experts of a layer with pairs or clusters, vLLM's own elsewhere.

        Raises LayoutError for a layer that vLLM makes of some in FP8 and some in bf16.
        """
        if isinstance(layer, LinearBase):
            return self.fp8.get_quant_method(layer, prefix) if self._in_fp8(prefix) else UnquantizedLinearMethod()
        if not isinstance(layer, RoutedExperts):
            return None
        if (index := decoder_layer(prefix)) is None:
            return None  # layers for multi-token prediction are dense
        merged, centres = self.layout.merged_experts.get(index, 0), self.layout.clusters.get(index)
        if not merged and centres is None:
            return None
        from puzzlemoe_vllm.method import PuzzleMoEMethod

        return PuzzleMoEMethod(layer.moe_config, self.files, merged, centres, prefix)

    @functools.cached_property
    def fp8(self) -> QuantizationConfig:
        """vLLM's own for linear layers in FP8."""
        from vllm.model_executor.layers.quantization.fp8 import Fp8Config

        return Fp8Config(True, activation_scheme="dynamic", weight_block_size=[FP8_BLOCK, FP8_BLOCK])

    def _in_fp8(self, prefix: str) -> bool:
        """Whether a linear layer, which may be several on disk, is stored in FP8."""
        if not self.fp8_layers:
            return False
        module, _, name = prefix.rpartition(".")
        parts = (FUSED | self.packed_modules_mapping).get(name, [name])
        stored = {f"{module}.{part}" in self.fp8_layers for part in parts}
        if len(stored) > 1:
            raise LayoutError(
                f"{prefix} is one layer to vLLM, but quantization_config has only some of {', '.join(parts)} in fp8: "
                "config.json was edited; copy or download it again"
            )
        return stored.pop()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Called by vLLM where its model's names differ from those on disk."""
        self.fp8_layers = frozenset(hf_to_vllm_mapper.apply_list(self.layout.fp8))


def _warn_of_other_routing(model: str, config: Any) -> None:
    """--hf-overrides are the user's word, but experts were merged for, and scored with, the routing on disk."""
    path = Path(model) / "config.json"
    if not os.path.isdir(model) or not path.exists():
        return
    on_disk = read_json_object(path)
    on_disk = on_disk.get("text_config") or on_disk
    for key in ROUTING:
        if key in on_disk and hasattr(config, key) and (value := getattr(config, key)) != on_disk[key]:
            logger.warning(
                "puzzlemoe: %s is %s, but the model was compressed with %s: its outputs differ from the scored ones",
                key,
                value,
                on_disk[key],
            )
