"""Turning a packed checkpoint into an ordinary dense bf16 one with the reconstructed weights."""

from __future__ import annotations

from dataclasses import dataclass

from puzzlemoe_offline.methods.base import LayerMethod, MethodError, NewLayer, dense_layer
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_offline.model.layer_experts import SourceLayer


@dataclass(frozen=True)
class Unpack(LayerMethod):
    """Experts keep the packed model's order, and so do the router's rows.  Experts of one cluster get the same weights.

    Any software that reads the source family reads the result, without the plugin.
    """

    passes = 0

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises MethodError when the model is not packed."""
        if checkpoint.quantization is None:
            raise MethodError(f"{checkpoint.folder} is not a packed model: its config.json has no quantization_config")

    def bits_per_weight(self, checkpoint: Checkpoint) -> float:
        """Those of bf16."""
        return 16.0

    def merge(self, layer: SourceLayer, seen: None) -> NewLayer:
        """Every expert, decoded."""
        experts = []
        for number, expert in enumerate(layer.experts):
            # Experts of one cluster are the same memory, which safetensors does not write twice.
            shared = layer.checkpoint.centre(layer.index, number) != number
            experts.append(Expert(*(weight.clone() for weight in expert.matrices)) if shared else expert)
        return dense_layer(layer, experts)
