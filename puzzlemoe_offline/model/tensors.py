"""The tensors of a model to be written, under the names that its family's own checkpoints use."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from puzzlemoe_offline.finite import all_finite
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_offline.model.fp8_layers import fp8_tensors
from puzzlemoe_offline.model.weight_files import CheckpointError
from puzzlemoe_vllm.format.fp8 import scales_name
from puzzlemoe_vllm.format.layout import weight_name


def experts_name(checkpoint: Checkpoint, layer: int) -> str:
    """What the names of a layer's routed experts begin with, e.g. `model.layers.3.mlp.experts`."""
    return f"{block_name(checkpoint, layer)}.experts"


def block_name(checkpoint: Checkpoint, layer: int) -> str:
    """The name of a layer's MoE block in what is written, e.g. `model.layers.3.mlp`."""
    return f"{checkpoint.family.prefix}layers.{layer}.{checkpoint.family.block}"


def plain_tensors(
    checkpoint: Checkpoint, layer: int, order: list[int] | None = None, fp8: Container[str] = ()
) -> dict[str, Tensor]:
    """The layer's tensors other than routed experts.

    order: the source ids of the experts to come, which the router's tensors follow; None leaves the router as it is.
    fp8: names of weights to be written in FP8.  Raises CheckpointError as `Checkpoint.plain_tensor` does.
    """
    tensors, router = {}, checkpoint.router(layer)
    for name in checkpoint.layer(layer).plain:
        target = written_name(checkpoint, layer, name)
        if name in fp8:
            tensors[target], tensors[scales_name(target)] = fp8_tensors(checkpoint, name)
            continue
        tensor = as_written(checkpoint, name)
        if order is not None and name in router:
            tensor = in_order(tensor, order, checkpoint.experts)
        tensors[target] = tensor
    return tensors


def written_name(checkpoint: Checkpoint, layer: int, name: str) -> str:
    """What a tensor of a layer is called where it is written: a source that was saved again may have another name for
    its MoE block."""
    block = checkpoint.layer(layer).block
    return name.replace(f"{block}.", f"{block_name(checkpoint, layer)}.", 1) if block else name


def in_order(tensor: Tensor, order: list[int], experts: int) -> Tensor:
    """A router's tensor [experts], [experts, H] or [1, experts] for the experts `order`."""
    return tensor[order] if tensor.shape[0] == experts else tensor[:, order]


def tensors_outside_layers(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Embedding, last norm and head.  Raises CheckpointError as `Checkpoint.plain_tensor` does."""
    return {name: as_written(checkpoint, name) for name in checkpoint.outside}


def copied_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Tensors of parts that are copied as they are, but for FP8 weights, which become bf16: what serves these parts
    reads nothing of scales.  Raises CheckpointError as `Checkpoint.tensor` does."""
    return {name: checkpoint.tensor(name) for name in checkpoint.copied}


def as_written(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor of no routed expert in bf16, but for those of a family that stay in float32.

    Raises CheckpointError as `Checkpoint.plain_tensor` does, and for a value that bf16 cannot hold.
    """
    stored = checkpoint.plain_tensor(name)
    if checkpoint.kept_in_float32(name):
        return stored
    tensor = stored.to(torch.bfloat16)
    if tensor is not stored and not all_finite(tensor):
        raise CheckpointError(f"{name} in {checkpoint.file_of(name)} holds values too large for bf16: fetch it again")
    return tensor


def dense_layer_tensors(checkpoint: Checkpoint, layer: int, experts: list[Expert]) -> dict[str, Tensor]:
    """The tensors of a layer whose experts all are dense, in the form that readers of the family take."""
    if not checkpoint.family.writes_fused:
        tensors: dict[str, Tensor] = {}
        for number, expert in enumerate(experts):
            tensors |= dense_tensors(checkpoint, layer, number, expert)
        return tensors
    gate_up, down = (f"{block_name(checkpoint, layer)}.{name}" for name in checkpoint.family.fused)
    return {
        gate_up: torch.stack([torch.cat([expert.gate, expert.up]) for expert in experts]),
        down: torch.stack([expert.down for expert in experts]),
    }


def dense_tensors(checkpoint: Checkpoint, layer: int, number: int, expert: Expert) -> dict[str, Tensor]:
    """A dense expert's tensors, beside packed ones or in a family whose experts are stored one by one."""
    experts = experts_name(checkpoint, layer)
    return {
        weight_name(experts, number, projection): weight
        for projection, weight in zip(checkpoint.family.projections, expert.matrices, strict=True)
    }
