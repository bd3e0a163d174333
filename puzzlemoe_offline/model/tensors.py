"""The tensors of a model to be written, under the names that its family's own checkpoints use."""

from __future__ import annotations

from torch import Tensor

from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_vllm.format.layout import weight_name


def experts_name(checkpoint: Checkpoint, layer: int) -> str:
    """What the names of a layer's routed experts begin with, e.g. `model.layers.3.mlp.experts`."""
    return f"model.layers.{layer}.{checkpoint.family.block}.experts"


def plain_tensors(checkpoint: Checkpoint, layer: int, order: list[int] | None = None) -> dict[str, Tensor]:
    """The layer's tensors other than routed experts.

    order: the source ids of the experts to come, which the router's rows follow; None leaves the router as it is.
    Raises CheckpointError as `Checkpoint.plain_tensor` does.
    """
    tensors = {}
    held = checkpoint.layer(layer)
    for name in held.plain:
        tensor = checkpoint.plain_tensor(name)
        if order is not None and name.startswith(f"{held.block}.gate."):
            tensor = tensor[order]
        if held.block:  # a source that was saved again may have another name for it
            name = name.replace(f"{held.block}.", f"model.layers.{layer}.{checkpoint.family.block}.", 1)
        tensors[name] = tensor
    return tensors


def tensors_outside_layers(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Embedding, last norm and head.  Raises CheckpointError as `Checkpoint.plain_tensor` does."""
    return {name: checkpoint.plain_tensor(name) for name in checkpoint.outside}


def dense_tensors(checkpoint: Checkpoint, layer: int, number: int, expert: Expert) -> dict[str, Tensor]:
    """A dense expert's tensors."""
    experts = experts_name(checkpoint, layer)
    return {
        weight_name(experts, number, projection): weight
        for projection, weight in zip(checkpoint.family.projections, expert.matrices, strict=True)
    }
