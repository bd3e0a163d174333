"""What a method does to the experts of one layer, and what it needs to know for that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

from puzzlemoe_offline.calibration.passes import LayerPasses, Recorder
from puzzlemoe_offline.calibration.statistics import ExpertStatistics
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_offline.model.layer_experts import SourceLayer
from puzzlemoe_offline.model.tensors import dense_layer_tensors
from puzzlemoe_vllm.errors import UserError
from puzzlemoe_vllm.format.layout import PuzzleConfig


class MethodError(UserError):
    """A model that a method cannot be applied to; the text names the option and the way out."""


class LayerRecord(BaseModel):
    """What is known of a layer once it is written: a row of puzzlemoe_report.json.

    seconds: by stage of the work: load (weights outside experts, for the model and to be written), calibrate, pair,
    merge, wait (of several GPUs, the first one's for the layer), write (until the shard before is written).
    order: new expert id -> the source's.  merged: how many experts are in pairs; pair_bytes: of one pair's words and
    steps; expert_bytes: of all tensors of routed experts.
    centres: for each expert the one that serves in its place, of experts merged in clusters.
    tokens: calibration tokens that chose each expert of the source; few_tokens: experts with too few of them.
    weight_error, output_error: ||difference|| / ||original||, of gate, up and down projection of all experts in pairs,
    and of the layer's output on sampled tokens.
    expert_weight_error, expert_output_error: the same of each expert of the source, the latter on the sampled tokens
    that chose it.
    An error is None where there is no such number: of a matrix of zeros that is zeros no more, of an expert that no
    sampled token chose, of activations that are not finite.
    lost: experts of the source that merging has lost (`LOST`), with nothing done about it; spared: those that stay
    dense because a pair of them would have lost one, with whatever had to stay dense for that.
    clamped: weights below the smallest that the words can hold.
    shared_choices: how often a token chose both partners of a pair, here and if partners were random.
    """

    layer: int
    seconds: dict[str, float] = {}
    order: list[int] | None = None
    merged: int | None = None
    pair_bytes: int | None = None
    expert_bytes: int | None = None
    centres: list[int] | None = None
    tokens: list[int] | None = None
    few_tokens: list[int] | None = None
    weight_error: list[float | None] | None = None
    output_error: float | None = None
    expert_weight_error: list[list[float | None]] | None = None
    expert_output_error: list[float | None] | None = None
    lost: list[int] | None = None
    spared: list[int] | None = None
    clamped: int | None = None
    shared_choices: dict[str, float] | None = None


@dataclass
class NewLayer:
    """What a method makes of a layer: the tensors of its routed experts, by name, and what is known of them.

    record.order, if any, are the source's ids of the new experts, whose rows of the router stay in that order.
    """

    tensors: dict[str, Tensor]
    record: LayerRecord

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class LayerMethod(ABC):
    """A way to make the routed experts smaller, applied to one layer at a time.

    packs: whether experts are stored in the method's own way, with a quantization_config, or else in bf16.
    """

    packs: ClassVar[bool] = False

    @property
    def passes(self) -> int:
        """How often the calibration tokens go through a layer; 0 for a method that needs none."""
        return 1

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises MethodError when the method does not fit the model."""
        if checkpoint.quantization:
            raise MethodError(f"{checkpoint.folder} is packed already; start from the 16-bit original")

    @abstractmethod
    def bits_per_weight(self, checkpoint: Checkpoint) -> float:
        """Bits that one weight of a routed expert takes in the method's own storage, scales and indices included, per
        weight of the source."""

    def experts_left(self, checkpoint: Checkpoint) -> int:
        """How many experts a layer has afterwards."""
        return checkpoint.experts

    def observe(self, layer: SourceLayer, passes: LayerPasses) -> Any:
        """What the method wants to know of the calibration tokens; makes all its passes.  Not of a method without any.

        What it returns must be a dataclass, if it is not to stay on this GPU (`devices.moved`).
        """
        raise NotImplementedError(f"{self} makes no passes")

    @abstractmethod
    def merge(self, layer: SourceLayer, seen: Any) -> NewLayer:
        """The layer's new experts, on its device; seen: what `observe` returned, None for a method without passes.

        Depends on nothing else, since several layers may be merged at once, each on a GPU.
        """

    def choices(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What was chosen, and what it comes to for this model, as JSON data."""
        return {"method": str(self)}

    def quantization(self, checkpoint: Checkpoint, records: list[LayerRecord]) -> PuzzleConfig | None:
        """What config.json says of packed experts, but for the provenance; None where all are in bf16."""
        return None

    def shard_metadata(self) -> dict[str, str]:
        """safetensors metadata of the files that are written."""
        return {"format": "pt"}


def expert_statistics(
    layer: SourceLayer,
    passes: LayerPasses,
    moments: bool = False,
    hidden_moments: bool = True,
    by_router: bool = False,
    record: Recorder | None = None,
) -> ExpertStatistics:
    """What each expert sees of the calibration tokens, in one pass; hidden_moments as in
    `ExpertStatistics.zeros`, record as in `LayerPasses.run`."""
    experts, sizes = layer.checkpoint.experts, layer.checkpoint.expert_sizes
    seen = ExpertStatistics.zeros(experts, *sizes, torch.device(layer.device), moments, hidden_moments, by_router)

    def record_choices(hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        seen.observe_choices(ids)
        if record:
            record(hidden, ids, weights, out)

    passes.run(seen.observe, record_choices)
    return seen


def dense_layer(layer: SourceLayer, experts: list[Expert], record: LayerRecord | None = None) -> NewLayer:
    """Experts in bf16, in the order of their ids."""
    tensors = dense_layer_tensors(layer.checkpoint, layer.index, experts)
    return NewLayer(tensors, record or LayerRecord(layer=layer.index))
