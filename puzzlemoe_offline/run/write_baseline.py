"""Writing a model whose experts a baseline has changed: layer by layer, as an ordinary dense bf16 checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.statistics import ExpertStatistics
from puzzlemoe_offline.calibration.text import Calibration
from puzzlemoe_offline.methods.base import BaselineError, Method, NewLayer, SourceLayer
from puzzlemoe_offline.methods.hc_smoe import MeanOutputs
from puzzlemoe_offline.model.checkpoint import Checkpoint, CheckpointError
from puzzlemoe_offline.model.layerwise import DecoderLayer, LayerExperts, LayerwiseModel, batch_size, check_whole
from puzzlemoe_offline.run.compress import dense_tensors, plain_tensors
from puzzlemoe_offline.run.output import ModelFolder, packed_dtype_config
from puzzlemoe_offline.run.report import CARD


def write_baseline(
    checkpoint: Checkpoint,
    method: Method,
    calibration: Calibration | None,
    device: str,
    out: Path,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> None:
    """Writes `out`; any software that reads the source family reads it.

    In memory at once: a layer's experts before and after, its statistics, and the hidden states of the calibration
    tokens.  calibration may be None for a method that needs nothing.
    Raises CheckpointError for a packed source, BaselineError for a model that the method does not fit, OutputError when
    `out` is not empty.
    """
    if checkpoint.quantization:
        raise CheckpointError(f"{checkpoint.folder} is packed already; start from the 16-bit original")
    if calibration is None and method.needs != "nothing":
        raise BaselineError("this method needs calibration text: give one with --calibration FILE")
    check_whole(checkpoint)
    method.check(checkpoint)
    folder = ModelFolder(out, checkpoint.layers + 1)
    folder.start(checkpoint.fingerprint(), resume=False)
    kept = checkpoint.experts
    for index, source in _layers(checkpoint, method, calibration, device):
        new = method.apply(source) if source else None
        folder.write_shard(index, _tensors(checkpoint, index, new), {}, None)
        kept = len(new.order) if new else kept
        del source, new  # not to be held while the next layer is made
        on_layer(index)
    folder.write_shard(checkpoint.layers, checkpoint.tensors_outside_layers(), {}, None)
    config = packed_dtype_config(checkpoint.config) | {checkpoint.family.experts_key(checkpoint.config): kept}
    card = f"{checkpoint.folder.name} with its experts changed, for comparison: {method}.\n"
    folder.finish(config, checkpoint.folder, {CARD: card})


def _layers(
    checkpoint: Checkpoint, method: Method, calibration: Calibration | None, device: str
) -> Iterator[tuple[int, SourceLayer | None]]:
    """Yields (index, what the method sees of the layer), None for layers without routed experts."""
    experts = LayerExperts(checkpoint, device)
    if calibration is None or method.needs == "nothing":
        for index in range(checkpoint.layers):
            yield index, _source_layer(checkpoint, experts, index) if index in checkpoint.moe_layers else None
        return
    model = LayerwiseModel(checkpoint, device)
    size = batch_size(calibration.tokens.shape[1])
    states = model.embed_all(calibration.tokens, size)
    for index, layer in model.layers(experts):
        source = _source_layer(checkpoint, experts, index) if layer.experts else None
        yield index, _calibrate(method, layer, source, states, size, model.device)
        del source  # not to be held while the next layer runs


def _source_layer(checkpoint: Checkpoint, experts: LayerExperts, index: int) -> SourceLayer:
    return SourceLayer(index, [experts(index, number) for number in range(checkpoint.experts)], None, None)


def _calibrate(
    method: Method,
    layer: DecoderLayer,
    source: SourceLayer | None,
    states: Tensor,
    size: int,
    device: torch.device,
) -> SourceLayer | None:
    """Moves `states` through the layer in place; `source` with what its experts saw."""
    statistics, outputs = None, None
    if layer.experts and source:
        hidden, intermediate = source.experts[0].down.shape
        statistics = ExpertStatistics.zeros(
            len(source.experts), hidden, intermediate, device, moments=method.needs == "moments"
        )
        layer.experts.observe = statistics.observe
        if method.needs == "outputs":
            outputs = MeanOutputs(source.experts)
            layer.experts.record = outputs.record
    layer.advance(states, size, device)
    if source is None:
        return None
    return SourceLayer(source.index, source.experts, statistics, outputs.mean() if outputs else None)


def _tensors(checkpoint: Checkpoint, layer: int, new: NewLayer | None) -> dict[str, Tensor]:
    """A layer's tensors under the family's own names."""
    if new is None:
        return plain_tensors(checkpoint, layer)
    tensors = plain_tensors(checkpoint, layer, new.order)
    for number, expert in enumerate(new.experts):
        tensors |= dense_tensors(checkpoint, layer, number, expert)
    return tensors
