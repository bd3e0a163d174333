"""The compression run: layer by layer, calibrate, merge, pack, write."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.statistics import FEW_TOKENS, ExpertStatistics, SampledTokens
from puzzlemoe_offline.calibration.text import Calibration
from puzzlemoe_offline.methods.mergemoe import ClusteredLayer, LayerMerger
from puzzlemoe_offline.methods.pairs import Losses, PackedLayer, pack_pair
from puzzlemoe_offline.model.checkpoint import Checkpoint, CheckpointError
from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_offline.model.families import expert_groups
from puzzlemoe_offline.model.layerwise import (
    DecoderLayer,
    LayerExperts,
    LayerwiseModel,
    StreamedExperts,
    batch_size,
    check_whole,
)
from puzzlemoe_offline.model.tokenizer import mended_config
from puzzlemoe_offline.pairing.pair_cost import merge_errors
from puzzlemoe_offline.pairing.partners import LayerPairing, PairCosts, pair_experts, shared_choices
from puzzlemoe_offline.recipe import Recipe
from puzzlemoe_offline.run.output import ModelFolder, packed_dtype_config
from puzzlemoe_offline.run.report import CARD, REPORT, build_report, model_card
from puzzlemoe_offline.version import VERSION
from puzzlemoe_vllm.format.codes import CODES, GROUP_SIZES, UnencodableWeight, get_code
from puzzlemoe_vllm.format.layout import Provenance, PuzzleConfig, steps_name, weight_name, words_name

ERROR_TOKENS = 2048
"""Calibration tokens on which the merged layer's output is compared with the original's."""


@dataclass(frozen=True)
class Job:
    """One compression run.  calibration is None for magnitude saliency."""

    checkpoint: Checkpoint
    source: str
    revision: str | None
    recipe: Recipe
    calibration: Calibration | None
    device: str

    def group_size(self) -> int | None:
        """Input columns that share a step: the recipe's choice, or the largest that fits; None for codes without steps.

        Raises CheckpointError when it does not divide the model's sizes.
        """
        if not get_code(self.recipe.code).has_steps:
            return None
        chosen, sizes = self.recipe.group_size, self.checkpoint.expert_sizes
        fitting = [size for size in GROUP_SIZES if all(columns % size == 0 for columns in sizes)]
        if chosen in fitting or (chosen is None and fitting):
            return chosen or fitting[0]
        without = " or ".join(name for name, code in CODES.items() if not code.has_steps)
        raise CheckpointError(
            f"{self.checkpoint.folder}: hidden size {sizes[0]} and intermediate size {sizes[1]} are not multiples of "
            f"--group-size {chosen or GROUP_SIZES[-1]}; "
            + (f"use --group-size {fitting[0]}" if fitting else f"use --code {without}, which has no groups")
        )

    def choices(self) -> dict[str, Any]:
        """What the recipe comes to for this model, as JSON data."""
        group = self.group_size()
        return self.recipe.heeded() | ({"group_size": group} if group else {})

    def check(self) -> None:
        """Raises CheckpointError when the model is packed already, or its experts do not fit the recipe."""
        if self.checkpoint.quantization:
            raise CheckpointError(f"{self.checkpoint.folder} is packed already; start from the 16-bit original")
        self.group_size()
        count, total = self.recipe.experts, self.checkpoint.experts
        if count is None and self.recipe.sparsity == 0.25 and total < 4:
            raise CheckpointError(
                f"--sparsity 0.25: half of the {total} experts per layer of {self.checkpoint.folder} are no pair; "
                "use --sparsity 0.5"
            )
        if count is not None and not 1 <= count < total:
            raise CheckpointError(
                f"--experts {count}: {self.checkpoint.folder} has {total} experts per layer; choose 1 to {total - 1}"
            )

    def fingerprint(self) -> str:
        """Digest of everything that the output depends on."""
        parts = (
            self.checkpoint.fingerprint(),
            self.recipe.model_dump_json(),
            self.calibration.digest if self.calibration else "",
            VERSION,
            torch.device(self.device).type,
        )
        return hashlib.sha256("|".join(parts).encode()).hexdigest()


def compress(job: Job, out: Path, resume: bool, on_layer: Callable[[int, dict[str, Any]], None]) -> dict[str, Any]:
    """Writes the packed model to `out` and returns the report.

    on_layer(layer, record) is called as each layer is finished, also for those that an earlier run finished.
    Raises CheckpointError, OutputError or UnencodableWeight; finished layers stay and `resume` goes on from there.
    """
    checkpoint = job.checkpoint
    job.check()
    check_whole(checkpoint)
    tokenizer = mended_config(checkpoint.folder)
    folder = ModelFolder(out, checkpoint.layers + 1)
    records = [entry["record"] for entry in folder.start(job.fingerprint(), resume)][: checkpoint.layers]
    for layer, record in enumerate(records):
        on_layer(layer, record)
    for layer, tensors, record, state in _run(job, folder, len(records)):
        began = time.perf_counter()
        last = layer + 1 == checkpoint.layers
        folder.write_shard(layer, tensors, record, None if last else state)
        del tensors  # not to be held while the next layer's are made
        record["seconds"]["write"] = time.perf_counter() - began
        records.append(record)
        on_layer(layer, record)
    folder.write_shard(checkpoint.layers, checkpoint.tensors_outside_layers(), {}, None)
    report = build_report(job, records)
    config = packed_dtype_config(checkpoint.config) | {"quantization_config": _quantization(job, records)}
    files = {REPORT: json.dumps(report, indent=2) + "\n", CARD: model_card(report, checkpoint.family)}
    folder.finish(config, checkpoint.folder, files | tokenizer)
    return report


def _run(
    job: Job, folder: ModelFolder, start: int
) -> Iterator[tuple[int, dict[str, Tensor], dict[str, Any], Tensor | None]]:
    """Yields (layer, tensors to write, record, hidden states after it) from layer `start` on."""
    if start == job.checkpoint.layers:
        return
    if job.calibration is None:
        experts = LayerExperts(job.checkpoint, job.device)
        for layer in range(start, job.checkpoint.layers):
            yield layer, *_finish_layer(job, layer, experts, None, None, 0.0), None
        return
    yield from _run_calibrated(job, job.calibration.tokens, folder, start)


def _run_calibrated(
    job: Job, tokens: Tensor, folder: ModelFolder, start: int
) -> Iterator[tuple[int, dict[str, Tensor], dict[str, Any], Tensor | None]]:
    model = LayerwiseModel(job.checkpoint, job.device)
    size = batch_size(tokens.shape[1])
    if start:
        batches = tokens.split(size)
        for batch in (batches[0], batches[-1]):
            model.embed(batch)
        states = folder.state_after(start - 1)
        assert states is not None
    else:
        states = model.embed_all(tokens, size)
    experts = LayerExperts(job.checkpoint, job.device)
    for index, layer in model.layers(experts, start):
        if job.recipe.experts and layer.experts:
            yield index, *_cluster_layer(job, index, layer, layer.experts, states, size), states
            continue
        began = time.perf_counter()
        statistics, sample = _calibrate_layer(job, layer, states, size)
        seconds = time.perf_counter() - began
        yield index, *_finish_layer(job, index, experts, statistics, sample, seconds), states
        del statistics, sample  # not to be held while the next layer runs


def _calibrate_layer(
    job: Job, layer: DecoderLayer, states: Tensor, size: int
) -> tuple[ExpertStatistics | None, SampledTokens | None]:
    """Moves `states` through the layer in place, gathering what its experts saw."""
    statistics, sample = None, None
    if layer.experts:
        statistics = ExpertStatistics.zeros(
            job.checkpoint.experts,
            *job.checkpoint.expert_sizes,
            torch.device(job.device),
            moments=job.recipe.compensate,
        )
        sample = SampledTokens(ERROR_TOKENS)
        layer.experts.observe, layer.experts.record = statistics.observe, _record_both(statistics, sample)
    layer.advance(states, size, job.device)
    return statistics, sample


def _cluster_layer(
    job: Job, index: int, layer: DecoderLayer, streamed: StreamedExperts, states: Tensor, size: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """MergeMoE: moves `states` through the layer in place; the layer's tensors to write, and its record.

    The layer runs twice, since what is summed up depends on which experts are used most.
    """
    assert job.recipe.experts is not None
    tokens = torch.zeros(job.checkpoint.experts, dtype=torch.int64)

    def count(hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        tokens.add_(ids.flatten().bincount(minlength=len(tokens)).cpu())

    began = time.perf_counter()
    streamed.record = count
    for batch in states.split(size):
        layer(batch.to(job.device))
    merger, sample = LayerMerger(streamed.expert, tokens, job.recipe.experts), SampledTokens(ERROR_TOKENS)

    def record(hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        merger.observe(hidden, ids)
        sample.record(hidden, ids, weights, out)

    streamed.record = record
    layer.advance(states, size, job.device)
    calibrated = time.perf_counter()
    merged = merger.finish()
    facts = {
        "layer": index,
        "centres": merged.centres,
        "tokens": tokens.tolist(),
        "few_tokens": _few(tokens),
        "output_error": _output_error(merged.expert, sample),
        "seconds": {"calibrate": calibrated - began, "merge": time.perf_counter() - calibrated},
    }
    return plain_tensors(job.checkpoint, index) | _cluster_tensors(job.checkpoint, index, merged), facts


def _few(tokens: Tensor) -> list[int]:
    """Experts that saw too few calibration tokens for their column norms to mean something."""
    return [expert for expert, count in enumerate(tokens.tolist()) if count < FEW_TOKENS]


def _record_both(statistics: ExpertStatistics, sample: SampledTokens) -> Callable[..., None]:
    """What the experts module calls with every batch's routing and output."""

    def record(hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        statistics.observe_choices(ids)
        sample.record(hidden, ids, weights, out)

    return record


def _finish_layer(
    job: Job,
    layer: int,
    experts: LayerExperts,
    statistics: ExpertStatistics | None,
    sample: SampledTokens | None,
    calibrate_seconds: float,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The layer's tensors to write, and its record."""
    record: dict[str, Any] = {"layer": layer, "seconds": {"calibrate": calibrate_seconds}}
    if layer not in job.checkpoint.moe_layers:
        return plain_tensors(job.checkpoint, layer), record
    began = time.perf_counter()
    groups = expert_groups(job.checkpoint.config)
    pairing = pair_experts(
        job.checkpoint.experts,
        job.recipe.sparsity,
        groups,
        statistics.tokens if statistics else None,
        job.recipe.seed * 100_003 + layer,
        _pair_costs(job, layer, experts, statistics),
    )
    record["seconds"]["pair"] = time.perf_counter() - began
    began = time.perf_counter()
    losses = Losses()
    packed = _pack_layer(job, layer, experts, statistics, pairing, losses)
    record |= {
        "order": pairing.order,
        "merged": pairing.merged,
        "weight_error": losses.relative(),
        "clamped": losses.clamped,
    }
    if statistics and sample:
        record["tokens"] = statistics.tokens.tolist()
        record["few_tokens"] = _few(statistics.tokens)
        record["output_error"] = _output_error(packed.expert, sample)
        shared, if_random = shared_choices(pairing, statistics.together, groups)
        record["shared_choices"] = {"this pairing": shared, "random partners": if_random}
    record["seconds"]["merge"] = time.perf_counter() - began
    return plain_tensors(job.checkpoint, layer, pairing.order) | _expert_tensors(job.checkpoint, layer, packed), record


def _pair_costs(job: Job, layer: int, experts: LayerExperts, statistics: ExpertStatistics | None) -> PairCosts | None:
    """What the recipe's pairing minimises; None for random partners."""
    if job.recipe.pairing == "search":

        def errors(pool: list[int]) -> Tensor:
            device = torch.device(job.device)
            try:
                return merge_errors(pool, partial(experts, layer), statistics, job.recipe, job.group_size(), device)
            except UnencodableWeight as error:
                raise UnencodableWeight(f"layer {layer}, {error}") from None

        return errors
    if job.recipe.pairing == "coactivation":
        assert statistics is not None
        return lambda pool: -statistics.together[pool][:, pool]
    return None


def _pack_layer(
    job: Job,
    layer: int,
    experts: LayerExperts,
    statistics: ExpertStatistics | None,
    pairing: LayerPairing,
    losses: Losses,
) -> PackedLayer:
    group, pairs = job.group_size(), []
    for first in range(0, pairing.merged, 2):
        ids = pairing.order[first], pairing.order[first + 1]
        members = experts(layer, ids[0]), experts(layer, ids[1])
        try:
            pairs.append(pack_pair(members, ids, statistics, job.recipe, group, losses))
        except UnencodableWeight as error:
            raise UnencodableWeight(f"layer {layer}, {error}") from None
    dense = [experts(layer, number) for number in pairing.order[pairing.merged :]]
    return PackedLayer(pairing, pairs, dense, get_code(job.recipe.code))


def _output_error(expert: Callable[[int], Expert], sample: SampledTokens) -> float:
    """||y - y'|| / ||y|| over the sampled tokens, with y the original experts' output and y' that of `expert`."""
    error = energy = 0.0
    for hidden, ids, weights, out in sample.batches:
        merged = StreamedExperts(expert)(hidden, ids, weights)
        error += float((merged.float() - out.float()).square().sum())
        energy += float(out.float().square().sum())
    return (error / energy) ** 0.5 if energy else 0.0


def plain_tensors(checkpoint: Checkpoint, layer: int, order: list[int] | None = None) -> dict[str, Tensor]:
    """The layer's tensors other than routed experts.

    order: the source ids of the experts to come, which the router's rows follow; None leaves the router as it is.
    Raises CheckpointError as `Checkpoint.plain_tensor` does.
    """
    tensors: dict[str, Tensor] = {}
    for name in checkpoint.names:
        if checkpoint.layer_of(name) != layer or checkpoint.is_expert(name):
            continue
        tensor = checkpoint.plain_tensor(name)
        if order is not None and name.startswith(f"{checkpoint.block(layer)}.gate."):
            tensor = tensor[order]
        tensors[_family_name(checkpoint, layer, name)] = tensor
    return tensors


def _family_name(checkpoint: Checkpoint, layer: int, name: str) -> str:
    """The name that the family's own checkpoints use (a source re-saved with another block name is renamed back)."""
    if layer not in checkpoint.moe_layers:
        return name
    return name.replace(f"{checkpoint.block(layer)}.", f"model.layers.{layer}.{checkpoint.family.block}.", 1)


def _expert_tensors(checkpoint: Checkpoint, layer: int, packed: PackedLayer) -> dict[str, Tensor]:
    experts, projections = f"model.layers.{layer}.{checkpoint.family.block}.experts", checkpoint.family.projections
    tensors: dict[str, Tensor] = {}
    for pair, matrices in enumerate(packed.pairs):
        for name, matrix in zip(projections, matrices, strict=True):
            tensors[words_name(experts, 2 * pair, name)] = matrix.words
            if matrix.steps is not None:
                tensors[steps_name(experts, 2 * pair, name)] = matrix.steps
    for row, expert in enumerate(packed.dense, packed.pairing.merged):
        tensors |= dense_tensors(checkpoint, layer, row, expert)
    return tensors


def dense_tensors(checkpoint: Checkpoint, layer: int, number: int, expert: Expert) -> dict[str, Tensor]:
    """A dense expert's tensors, under the family's own names."""
    experts = f"model.layers.{layer}.{checkpoint.family.block}.experts"
    return {
        weight_name(experts, number, projection): weight
        for projection, weight in zip(checkpoint.family.projections, expert.matrices, strict=True)
    }


def _cluster_tensors(checkpoint: Checkpoint, layer: int, merged: ClusteredLayer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for centre, expert in merged.merged.items():
        tensors |= dense_tensors(checkpoint, layer, centre, expert)
    return tensors


def _quantization(job: Job, records: list[dict[str, Any]]) -> dict[str, Any]:
    calibration = job.calibration
    provenance = Provenance(
        source=job.source,
        revision=job.revision,
        tool_version=VERSION,
        recipe=job.choices(),
        calibration={
            "source": calibration.source,
            "samples": calibration.tokens.shape[0],
            "sequence_length": calibration.tokens.shape[1],
            "sha256": calibration.digest,
        }
        if calibration
        else None,
    )
    merged = {record["layer"]: record["merged"] for record in records if record.get("merged")}
    clusters = {record["layer"]: record["centres"] for record in records if "centres" in record}
    return PuzzleConfig(
        code=job.recipe.code,
        group_size=job.group_size(),
        merged_experts=merged,
        clusters=clusters,
        provenance=provenance,
    ).model_dump(mode="json")
