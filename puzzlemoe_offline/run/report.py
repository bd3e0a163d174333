"""What a run did: puzzlemoe_report.json, its table for a terminal, and the provenance in config.json."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from pydantic import BaseModel
from rich.console import Group
from rich.table import Table

from puzzlemoe_offline.calibration.text import Calibration
from puzzlemoe_offline.methods.base import LayerRecord
from puzzlemoe_offline.run.job import Job
from puzzlemoe_offline.version import VERSION
from puzzlemoe_vllm.format.layout import Provenance

REPORT = "puzzlemoe_report.json"
GB = 1e9
MB = 1e6


class Sizes(BaseModel):
    """Bytes of routed experts, as source and method store them, and of everything else."""

    experts_before: int
    experts_after: int
    other: int


class Report(BaseModel):
    """Sizes in bytes, errors relative (||difference|| / ||original||), times in seconds.

    recipe: what was chosen, and what it came to.  bytes_per_token: of experts that one token loads, see `_loaded`.
    """

    source: str
    revision: str | None
    tool_version: str
    recipe: dict[str, Any]
    calibration: dict[str, Any] | None
    bytes: Sizes
    bytes_per_token: dict[str, float] | None
    seconds: dict[str, float]
    layers: list[LayerRecord]

    def text(self) -> str:
        """As the file holds it; a layer has no rows for what is not known of it."""
        layers = [layer.model_dump(exclude_none=True) for layer in self.layers]
        return json.dumps(self.model_dump(exclude={"layers"}) | {"layers": layers}, indent=2) + "\n"

    @property
    def changed(self) -> list[LayerRecord]:
        """Layers whose experts were merged or dropped."""
        return [layer for layer in self.layers if layer.order or layer.centres]


def build_report(job: Job, calibration: Calibration | None, records: list[LayerRecord]) -> Report:
    """The report of a run that has written all layers."""
    stages = sorted({stage for record in records for stage in record.seconds})
    return Report(
        source=job.source,
        revision=job.revision,
        tool_version=VERSION,
        recipe=job.method.choices(job.checkpoint),
        calibration={
            "source": calibration.source,
            "tokens": calibration.tokens.numel(),
            "sources": [dataclasses.asdict(source) for source in calibration.sources],
        }
        if calibration
        else None,
        bytes=Sizes(
            experts_before=job.checkpoint.routed_bytes,
            experts_after=job.experts_after,
            other=job.checkpoint.other_bytes,
        ),
        bytes_per_token=_loaded(job, calibration, records) if calibration else None,
        seconds={stage: sum(record.seconds.get(stage, 0.0) for record in records) for stage in stages},
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
        assert record.tokens and record.order and record.shared_choices and record.pair_bytes
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
        recipe=job.method.choices(job.checkpoint),
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
    for column in ("layer", "merged experts", "gate", "up", "down", "output", "clamped", "fewest tokens"):
        table.add_column(column, justify="right")
    for layer in report.changed:
        table.add_row(*_row(layer))
    sizes = report.bytes
    lines = [
        f"expert weights  {sizes.experts_before / GB:.3f} GB -> {sizes.experts_after / GB:.3f} GB",
        f"other weights   {sizes.other / GB:.3f} GB, unchanged",
        "seconds         " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.seconds.items()),
    ]
    if loaded := report.bytes_per_token:
        lines.append(
            f"one token loads {loaded['this pairing'] / MB:.2f} MB of experts on average, "
            f"{loaded['random partners'] / MB:.2f} MB with random partners, {loaded['before'] / MB:.2f} MB before"
        )
    if few := sum(len(layer.few_tokens or ()) for layer in report.changed):
        lines.append(f"[yellow]{few} experts saw too few calibration tokens to tell which inputs matter")
    return Group(table, *lines)


def _row(layer: LayerRecord) -> list[str]:
    merged = str(layer.merged)
    if layer.centres:
        merged = f"{len(layer.centres)} in {len(set(layer.centres))}"
    errors = [f"{error:.4f}" for error in layer.weight_error or ()] or ["-"] * 3
    output = "-" if layer.output_error is None else f"{layer.output_error:.4f}"
    clamped = "-" if layer.clamped is None else str(layer.clamped)
    return [str(layer.layer), merged, *errors, output, clamped, str(min(layer.tokens)) if layer.tokens else "-"]
