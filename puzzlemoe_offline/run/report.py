"""What a run did: puzzlemoe_report.json, its table for a terminal, and the provenance in config.json."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from pydantic import BaseModel
from rich.console import Group
from rich.filesize import decimal
from rich.table import Table

from puzzlemoe_offline.calibration.text import Calibration
from puzzlemoe_offline.methods.base import LayerRecord
from puzzlemoe_offline.run.job import Job, Sizes
from puzzlemoe_offline.version import VERSION
from puzzlemoe_vllm.format.layout import Provenance

REPORT = "puzzlemoe_report.json"
NAMED = 4
"""Layers whose experts a warning names."""

MB = 1e6


class Report(BaseModel):
    """Sizes in bytes, errors relative (||difference|| / ||original||), times in seconds.

    recipe: what was chosen, and what it came to.  bytes_per_token: of experts that one token loads, see `_loaded`.
    seconds: start (imports, checks, fetching), text (calibration text as tokens), embed (hidden states before the first
    layer), those of all layers as `LayerRecord` has them, finish (what is outside layers, and the shards written
    behind).  Of a resumed run those of its layers are of all, the others its own.  devices: GPUs that took part, 1 on a
    CPU; of several, the others pair and merge while the first one calibrates, so that the seconds are more than passed.
    """

    source: str
    revision: str | None
    tool_version: str
    recipe: dict[str, Any]
    calibration: dict[str, Any] | None
    bytes: Sizes
    bytes_per_token: dict[str, float] | None
    devices: int
    seconds: dict[str, float]
    layers: list[LayerRecord]

    def text(self) -> str:
        """As the file holds it; a layer has no rows for what is not known of it."""
        layers = [layer.model_dump(exclude_none=True) for layer in self.layers]
        text = json.dumps(self.model_dump(exclude={"layers"}) | {"layers": layers}, indent=2, allow_nan=False)
        return text + "\n"

    @property
    def changed(self) -> list[LayerRecord]:
        """Layers whose experts were merged or dropped."""
        return [layer for layer in self.layers if layer.order or layer.centres]


def layer_seconds(records: list[LayerRecord]) -> dict[str, float]:
    """Seconds of all layers by stage, in the order of the work."""
    stages = dict.fromkeys(stage for record in records for stage in record.seconds)
    return {stage: sum(record.seconds.get(stage, 0.0) for record in records) for stage in stages}


def build_report(
    job: Job, calibration: Calibration | None, records: list[LayerRecord], seconds: dict[str, float], devices: int
) -> Report:
    """The report of a run that has written all layers, and took so many seconds by stage on so many devices."""
    return Report(
        source=job.source,
        revision=job.revision,
        tool_version=VERSION,
        recipe=job.choices,
        calibration={
            "source": calibration.source,
            "tokens": calibration.tokens.numel(),
            "sources": [dataclasses.asdict(source) for source in calibration.sources],
        }
        if calibration
        else None,
        bytes=job.sizes.model_copy(
            update={"experts_after": sum(record.expert_bytes or 0 for record in records)} if job.method.packs else {}
        ),
        bytes_per_token=_loaded(job, calibration, records) if calibration else None,
        devices=devices,
        seconds=seconds,
        layers=records,
    )


def _loaded(job: Job, calibration: Calibration, records: list[LayerRecord]) -> dict[str, float] | None:
    """Bytes of experts that one token loads on average, on the calibration text: a pair is loaded once for both its
    experts.  With this pairing, as expected of random partners, and before compression; None without pairs."""
    totals = {"this pairing": 0.0, "random partners": 0.0, "before": 0.0}
    paired = [record for record in records if record.shared_choices]
    if not paired:
        return None
    dense = job.checkpoint.expert_bytes
    for record in paired:
        assert record.tokens and record.order and record.shared_choices and record.pair_bytes is not None
        in_pairs = sum(record.tokens[expert] for expert in record.order[: record.merged])
        alone = dense * (sum(record.tokens) - in_pairs)
        totals["before"] += dense * sum(record.tokens)
        for pairing, shared in record.shared_choices.items():
            totals[pairing] += alone + record.pair_bytes * (in_pairs - shared)
    return {name: total / calibration.tokens.numel() for name, total in totals.items()}


def provenance(job: Job, calibration: Calibration | None) -> Provenance:
    """Where a packed model comes from."""
    return Provenance(
        source=job.source,
        revision=job.revision,
        tool_version=VERSION,
        recipe=job.choices,
        calibration={
            "source": calibration.source,
            "samples": calibration.tokens.shape[0],
            "sequence_length": calibration.tokens.shape[1],
            "sha256": calibration.digest,
        }
        if calibration
        else None,
    )


def summary(report: Report) -> Group:
    """The report for a terminal."""
    table = Table(title="Relative error per layer")
    columns = "layer", "merged experts", "gate", "up", "down", "output", "worst expert", "clamped", "fewest tokens"
    for column in columns:
        table.add_column(column, justify="right")
    for layer in report.changed:
        table.add_row(*_row(layer))
    sizes = report.bytes
    lines = [
        f"expert weights  {sizes.experts_text}",
        f"other weights   {sizes.other_text}",
        *(f"copied          {decimal(size)} of these, {part}" for part, size in sizes.copied.items()),
        "seconds         " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.seconds.items()),
    ]
    if loaded := report.bytes_per_token:
        lines.append(
            f"one token loads {loaded['this pairing'] / MB:.2f} MB of experts on average, "
            f"{loaded['random partners'] / MB:.2f} MB with random partners, {loaded['before'] / MB:.2f} MB before"
        )
    if few := sum(len(layer.few_tokens or ()) for layer in report.changed):
        lines.append(f"[yellow]{few} experts saw too few calibration tokens to tell which inputs matter")
    lines += [f"[yellow]{line}" for line in warnings(report)]
    return Group(table, *lines)


def warnings(report: Report) -> list[str]:
    """A line for experts that merging lost, and one for those that stay dense lest it did."""
    found = []
    if lost := {layer.layer: layer.lost for layer in report.changed if layer.lost}:
        found.append(
            f"{_named(lost)}: merging lost these beside their partners; --recipe default leaves such experts dense"
        )
    if spared := {layer.layer: layer.spared for layer in report.changed if layer.spared}:
        found.append(f"{_named(spared)}: stay dense, since a pair of them would have lost one of its experts")
    return found


def _named(experts: dict[int, list[int]]) -> str:
    """The source's experts of some layers, the first `NAMED` layers by their ids."""
    layers = [f"layer {layer}: {', '.join(map(str, ids))}" for layer, ids in list(experts.items())[:NAMED]]
    more = len(experts) - len(layers)
    rest = f"; {more} more layers in {REPORT}" if more else ""
    return f"{sum(map(len, experts.values()))} experts ({'; '.join(layers)}{rest})"


def worst_expert(layer: LayerRecord) -> tuple[int, float] | None:
    """The source's id and the error of a layer's expert that lost most, by its output where tokens chose it, or else by
    its worst projection; an expert of zeros that is zeros no more has lost infinitely much.  None where neither is
    known."""
    outputs = layer.expert_output_error or []
    if any(error is not None for error in outputs):
        errors = [-1.0 if error is None else error for error in outputs]
    elif layer.expert_weight_error:
        errors = [max(math.inf if e is None else e for e in own) for own in layer.expert_weight_error]
    else:
        return None
    worst = max(range(len(errors)), key=errors.__getitem__)
    return worst, errors[worst]


def _row(layer: LayerRecord) -> list[str]:
    merged = str(layer.merged)
    if layer.centres:
        merged = f"{len(layer.centres)} in {len(set(layer.centres))}"
    errors = [_error(error) for error in layer.weight_error or [None] * 3]
    worst = worst_expert(layer)
    own = f"{worst[0]}: {worst[1]:.4f}" if worst else "-"
    clamped = "-" if layer.clamped is None else str(layer.clamped)
    return [
        str(layer.layer),
        merged,
        *errors,
        _error(layer.output_error),
        own,
        clamped,
        str(min(layer.tokens)) if layer.tokens else "-",
    ]


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.4f}"
