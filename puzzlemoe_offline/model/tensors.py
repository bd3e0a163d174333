"""The tensors of a model to be written, under the names that its family's own checkpoints use."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from puzzlemoe_offline.model.checkpoint import Checkpoint, kept_in_float32
from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_offline.model.fp8_layers import fp8_tensors
from puzzlemoe_offline.model.weight_files import CheckpointError
from puzzlemoe_vllm.format.fp8 import scales_name
from puzzlemoe_vllm.format.layout import weight_name


def experts_name(checkpoint: Checkpoint, layer: int) -> str:
    """What the names of a layer's routed experts begin with, e.g. `model.layers.3.mlp.experts`."""
    return f"model.layers.{layer}.{checkpoint.family.block}.experts"


def plain_tensors(
    checkpoint: Checkpoint, layer: int, order: list[int] | None = None, fp8: Container[str] = ()
) -> dict[str, Tensor]:
    """The layer's tensors other than routed experts.

    order: the source ids of the experts to come, which the router's rows follow; None leaves the router as it is.
    fp8: names of weights to be written in FP8.  Raises CheckpointError as `Checkpoint.plain_tensor` does.
    """
    tensors = {}
    held = checkpoint.layer(layer)
    for name in held.plain:
        target = written_name(checkpoint, layer, name)
        if name in fp8:
            tensors[target], tensors[scales_name(target)] = fp8_tensors(checkpoint, name)
            continue
        tensor = as_written(checkpoint, name)
        if order is not None and name.startswith(f"{held.block}.gate."):
            tensor = tensor[order]
        tensors[target] = tensor
    return tensors


def written_name(checkpoint: Checkpoint, layer: int, name: str) -> str:
    """What a tensor of a layer is called where it is written: a source that was saved again may have another name for
    its MoE block."""
    block = checkpoint.layer(layer).block
    return name.replace(f"{block}.", f"model.layers.{layer}.{checkpoint.family.block}.", 1) if block else name


def tensors_outside_layers(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Embedding, last norm and head.  Raises CheckpointError as `Checkpoint.plain_tensor` does."""
    return {name: as_written(checkpoint, name) for name in checkpoint.outside}


def as_written(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor of no routed expert in bf16, but for those of a family that stay in float32.

    Raises CheckpointError as `Checkpoint.plain_tensor` does, and for a value that bf16 cannot hold.
    """
    stored = checkpoint.plain_tensor(name)
    if kept_in_float32(name):
        return stored
    tensor = stored.to(torch.bfloat16)
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name} in {checkpoint.file_of(name)} holds values too large for bf16: fetch it again")
    return tensor


def dense_tensors(checkpoint: Checkpoint, layer: int, number: int, expert: Expert) -> dict[str, Tensor]:
    """A dense expert's tensors."""
    experts = experts_name(checkpoint, layer)
    return {
        weight_name(experts, number, projection): weight
        for projection, weight in zip(checkpoint.family.projections, expert.matrices, strict=True)
    }
