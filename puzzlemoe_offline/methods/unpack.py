"""Turning a packed checkpoint into an ordinary dense bf16 one with the reconstructed weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from puzzlemoe_offline.model.checkpoint import Checkpoint, CheckpointError
from puzzlemoe_offline.model.layerwise import check_whole
from puzzlemoe_offline.run.output import ModelFolder, packed_dtype_config
from puzzlemoe_offline.run.report import CARD, REPORT
from puzzlemoe_vllm.format.layout import weight_name


def unpack(checkpoint: Checkpoint, out: Path, on_layer: Callable[[int], None] = lambda layer: None) -> None:
    """Writes `out`; any software that reads the source family reads it, without the plugin.

    Experts keep the packed model's order, and so do the router's rows.  Experts of one cluster get the same weights.
    Raises CheckpointError when the checkpoint is not packed, OutputError when `out` is not empty.
    """
    if checkpoint.quantization is None:
        raise CheckpointError(f"{checkpoint.folder} is not a packed model: its config.json has no quantization_config")
    check_whole(checkpoint)
    folder = ModelFolder(out, checkpoint.layers + 1)
    folder.start(checkpoint.fingerprint(), resume=False)
    for layer in range(checkpoint.layers):
        folder.write_shard(layer, _layer_tensors(checkpoint, layer), {}, None)
        on_layer(layer)
    folder.write_shard(checkpoint.layers, checkpoint.tensors_outside_layers(), {}, None)
    card = f"Dense bf16 weights reconstructed from the PuzzleMoE model {checkpoint.folder.name}.\n"
    folder.finish(packed_dtype_config(checkpoint.config), checkpoint.folder, {CARD: card})
    (out / REPORT).unlink(missing_ok=True)


def _layer_tensors(checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
    names = [name for name in checkpoint.names if checkpoint.layer_of(name) == layer and not checkpoint.is_expert(name)]
    tensors = {name: checkpoint.plain_tensor(name) for name in names}
    if layer in checkpoint.moe_layers:
        experts = f"{checkpoint.block(layer)}.experts"
        for number in range(checkpoint.experts):
            expert = checkpoint.expert(layer, number)
            for name, weight in zip(checkpoint.family.projections, expert.matrices, strict=True):
                # Experts of one cluster are the same memory, which safetensors does not write twice.
                shared = checkpoint.centre(layer, number) != number
                tensors[weight_name(experts, number, name)] = weight.clone() if shared else weight
    return tensors
