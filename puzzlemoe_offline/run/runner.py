"""The one loop over a model's layers: calibrate, change the experts, write; for every method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.passes import LayerPasses
from puzzlemoe_offline.calibration.text import Calibration
from puzzlemoe_offline.methods.base import LayerRecord
from puzzlemoe_offline.model.hub import small_files
from puzzlemoe_offline.model.layer_experts import LayerExperts
from puzzlemoe_offline.model.tensors import copied_tensors, plain_tensors, tensors_outside_layers
from puzzlemoe_offline.model.tokenizer import mended_config
from puzzlemoe_offline.run.card import model_card
from puzzlemoe_offline.run.devices import ObservedLayer, in_order, other_gpus
from puzzlemoe_offline.run.files import OutputError
from puzzlemoe_offline.run.job import Job
from puzzlemoe_offline.run.output import ModelFolder
from puzzlemoe_offline.run.report import REPORT, Report, build_report, layer_seconds, provenance
from puzzlemoe_offline.run.stages import Stages
from puzzlemoe_vllm.format.layout import TRANSFORMERS_WEIGHTS
from puzzlemoe_vllm.format.shards import CARD


def check(job: Job, out: Path, resume: bool) -> ModelFolder:
    """What can be refused before any weight or text is read, from headers alone.

    Raises MethodError for a model that the method does not fit, OutputError for a folder that cannot take the result,
    and what `small_files` raises for a file that cannot be copied.
    """
    job.method.check(job.checkpoint)
    small_files(job.checkpoint.folder)
    source, target = job.checkpoint.folder.resolve(), out.resolve()
    if source in (target, *target.parents):
        raise OutputError(f"{out} is the source or lies inside it: name a folder elsewhere")
    folder = ModelFolder(out, job.shards, job.method.shard_metadata())
    folder.check(resume, job.disk_bytes)
    return folder


def run(
    job: Job,
    calibration: Calibration | None,
    out: Path,
    resume: bool = False,
    on_layer: Callable[[LayerRecord], None] = lambda record: None,
    stages: Stages | None = None,
) -> Report | None:
    """Writes the model to `out` and returns the report; None when an earlier run of the same job has finished it and
    `resume` allows that.

    calibration: None for a method that needs none.  on_layer is called as each layer is written, also for those that
    an earlier run finished.  stages: of the command so far, which the report lists with those of the run.
    Raises UserError; finished layers stay and `resume` goes on from there.
    """
    folder = check(job, out, resume)
    with folder.opened(job.fingerprint(calibration), resume, job.disk_bytes) as finished:
        return None if finished is None else _write(job, calibration, folder, finished, on_layer, stages or Stages())


def _write(
    job: Job,
    calibration: Calibration | None,
    folder: ModelFolder,
    finished: list[LayerRecord | None],
    on_layer: Callable[[LayerRecord], None],
    stages: Stages,
) -> Report:
    """Writes what is not finished yet."""
    checkpoint = job.checkpoint
    tokenizer = mended_config(checkpoint.folder)
    records = [record for record in finished if record]
    for record in records:
        on_layer(record)
    others = other_gpus(job.model.device)
    observed = _observed(job, calibration, folder, len(records), stages, in_place=not (others or job.on_gpu))
    with closing(in_order(observed, job.method.merge, others)) as layers:
        for new, states in layers:
            record, began = new.record, time.perf_counter()
            tensors = plain_tensors(checkpoint, record.layer, record.order, job.fp8) | new.tensors
            del new  # not to be held while the next layer is made
            record.seconds["load"] += time.perf_counter() - began
            last = record.layer + 1 == checkpoint.layers
            folder.write_shard(record.layer, tensors, None if last else states, record, behind=job.on_gpu)
            del tensors, states
            records.append(record)
            on_layer(record)
    stages.lap()
    stages.seconds |= layer_seconds(records)
    for number, tensors_of in enumerate((tensors_outside_layers, copied_tensors), checkpoint.layers):
        if len(finished) <= number < job.shards:
            folder.write_shard(number, tensors_of(checkpoint), None, None)
    checkpoint.close()  # while the last shard is read for its digest
    folder.wait()
    stages.end("finish")
    report = build_report(job, calibration, records, stages.seconds, 1 + len(others))
    files = {REPORT: report.text(), CARD: model_card(job, report)}
    folder.finish(_config(job, calibration, records), checkpoint.folder, files | tokenizer)
    return report


def _config(job: Job, calibration: Calibration | None, records: list[LayerRecord]) -> dict[str, object]:
    """config.json of the result."""
    checkpoint = job.checkpoint
    dropped = ("quantization_config", "transformers_weights")
    config = {key: value for key, value in checkpoint.config.items() if key not in dropped}
    # The second is the only one that transformers before 4.56 knows, and without it loads float32.
    dtype = {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    text = checkpoint.text | dtype
    key = checkpoint.family.experts_key(text)
    if (left := job.method.experts_left(checkpoint)) != checkpoint.experts:
        text[key] = left
    config |= dtype | ({"text_config": text} if checkpoint.family.nested else {key: text[key]})
    if quantization := job.method.quantization(checkpoint, records):
        update = {"provenance": provenance(job, calibration), "fp8": job.fp8_layers}
        known = quantization.model_copy(update=update)
        config["quantization_config"] = known.model_dump(mode="json")
        config["transformers_weights"] = TRANSFORMERS_WEIGHTS
    return config


def _observed(
    job: Job, calibration: Calibration | None, folder: ModelFolder, start: int, stages: Stages, in_place: bool
) -> Iterator[ObservedLayer]:
    """Every layer from `start` on, calibrated if the method asks for that.  in_place: hidden states after a layer go
    where those before it were."""
    checkpoint, device = job.checkpoint, job.device
    experts = LayerExperts(checkpoint, device)
    if start == checkpoint.layers:
        return
    experts.read_ahead(start)  # while the tokens are embedded
    if not job.method.passes:
        for index in range(start, checkpoint.layers):
            yield _observe(job, index, experts, None, None, time.perf_counter())
        return
    assert calibration, f"{job.method} needs calibration text"
    tokens, model = calibration.tokens, job.model
    windows = model.batch_size(tokens.shape[1])
    states = folder.state_after(start - 1) if start else model.embed_all(tokens, windows)
    if start:  # layers take arguments that depend on a batch's size
        batches = tokens.split(windows)
        for batch in (batches[0], batches[-1]):
            model.embed(batch)
    stages.end("embed")
    began = time.perf_counter()
    for index, layer in model.layers(experts, start):
        # Those of layers that are not written yet stay as they are; torch keeps pinned memory for the next time.
        after = states if in_place else torch.empty_like(states, pin_memory=job.on_gpu)
        passes = LayerPasses(layer, states, after, windows, device, job.method.passes if layer.experts else 1)
        yield _observe(job, index, experts, passes, after, began)
        began, states = time.perf_counter(), after


def _observe(
    job: Job, index: int, experts: LayerExperts, passes: LayerPasses | None, states: Tensor | None, began: float
) -> ObservedLayer:
    """A layer that was begun to be loaded at `began`; states: where those after it go."""
    source = experts.of(index) if job.checkpoint.layer(index).block else None
    seconds, seen = {"load": time.perf_counter() - began}, None
    if passes:
        began = time.perf_counter()
        if source:
            seen = job.method.observe(source, passes)
        else:
            passes.run()
        assert passes.left == 0, f"{job.method} made fewer passes than it said"
        seconds["calibrate"] = time.perf_counter() - began
    return ObservedLayer(index, source, seen, states, seconds)
