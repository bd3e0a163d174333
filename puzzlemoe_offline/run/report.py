"""The compression report (JSON and text) and the packed model's card."""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

from puzzlemoe_offline.model.families import Family
from puzzlemoe_offline.version import VERSION
from puzzlemoe_vllm.format.codes import get_code

if TYPE_CHECKING:
    from puzzlemoe_offline.run.compress import Job

REPORT = "puzzlemoe_report.json"
CARD = "README.md"
GB = 1e9
MB = 1e6


def build_report(job: Job, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The report as JSON data; sizes in bytes, errors relative (||difference|| / ||original||), times in seconds."""
    checkpoint = job.checkpoint
    dense = expert_bytes(job)
    share = get_code(job.recipe.code).bits_per_pair(job.group_size()) / 32
    merged = [record for record in records if record.get("merged")]
    packed = sum(
        dense * record["merged"] * share + dense * (checkpoint.experts - record["merged"]) for record in merged
    ) + sum(dense * len(set(record["centres"])) for record in records if "centres" in record)
    stages = {stage for record in records for stage in record["seconds"]}
    return {
        "source": job.source,
        "revision": job.revision,
        "tool_version": VERSION,
        "recipe": job.choices(),
        "calibration": {"source": job.calibration.source, "tokens": job.calibration.tokens.numel()}
        if job.calibration
        else None,
        "bytes": {
            "experts_before": dense * checkpoint.experts * len(checkpoint.moe_layers),
            "experts_after": int(packed),
            "other": other_bytes(job),
        },
        "bytes_per_token": _bytes_per_token(job, merged, dense, share) if job.calibration and merged else None,
        "seconds": {stage: sum(record["seconds"].get(stage, 0.0) for record in records) for stage in sorted(stages)},
        "layers": records,
    }


def _bytes_per_token(job: Job, merged: list[dict[str, Any]], dense: int, share: float) -> dict[str, float]:
    """Bytes of experts that one token loads on average, on the calibration text: a pair is loaded once for both its
    experts.  With this pairing, as expected of random partners, and before compression."""
    assert job.calibration is not None
    totals = {"this pairing": 0.0, "random partners": 0.0, "before": 0.0}
    for record in merged:
        in_pairs = sum(record["tokens"][expert] for expert in record["order"][: record["merged"]])
        alone = dense * (sum(record["tokens"]) - in_pairs)
        totals["before"] += dense * sum(record["tokens"])
        for pairing, shared in record["shared_choices"].items():
            totals[pairing] += alone + 2 * dense * share * (in_pairs - shared)
    return {name: total / job.calibration.tokens.numel() for name, total in totals.items()}


def expert_bytes(job: Job) -> int:
    """Bytes of one dense bf16 expert."""
    hidden, intermediate = job.checkpoint.expert_sizes
    return 3 * 2 * hidden * intermediate


def other_bytes(job: Job) -> int:
    """Bytes of everything but routed experts."""
    checkpoint = job.checkpoint
    return sum(checkpoint.nbytes(name) for name in checkpoint.names if not checkpoint.is_expert(name))


def summary(report: dict[str, Any]) -> Group:
    """The report for a terminal."""
    sizes, layers = report["bytes"], _merged_layers(report)
    table = Table(title="Relative error per layer")
    for column in ("layer", "merged experts", "gate", "up", "down", "output", "clamped", "fewest tokens"):
        table.add_column(column, justify="right")
    for layer in layers:
        output = f"{layer['output_error']:.4f}" if "output_error" in layer else "-"
        tokens = str(min(layer["tokens"])) if "tokens" in layer else "-"
        errors = [f"{error:.4f}" for error in layer.get("weight_error", ())] or ["-"] * 3
        merged = f"{len(layer['centres'])} in {len(set(layer['centres']))}" if "centres" in layer else layer["merged"]
        table.add_row(str(layer["layer"]), str(merged), *errors, output, str(layer.get("clamped", "-")), tokens)
    few = sum(len(layer.get("few_tokens", ())) for layer in layers)
    lines = [
        f"expert weights  {sizes['experts_before'] / GB:.3f} GB -> {sizes['experts_after'] / GB:.3f} GB",
        f"other weights   {sizes['other'] / GB:.3f} GB, unchanged",
        "seconds         " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report["seconds"].items()),
    ]
    if loaded := report["bytes_per_token"]:
        lines.append(
            f"one token loads {loaded['this pairing'] / MB:.2f} MB of experts on average, "
            f"{loaded['random partners'] / MB:.2f} MB with random partners, {loaded['before'] / MB:.2f} MB before"
        )
    if few:
        lines.append(f"[yellow]{few} experts saw too few calibration tokens to tell which inputs matter")
    return Group(table, *lines)


def _merged_layers(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [layer for layer in report["layers"] if layer.get("merged") or "centres" in layer]


def serve_command(folder: str, family: Family) -> str:
    """What serves a packed model."""
    return f"vllm serve {folder}" + (" --trust-remote-code" if family.remote_config else "")


def model_card(report: dict[str, Any], family: Family) -> str:
    """README.md of a packed model."""
    sizes, recipe = report["bytes"], report["recipe"]
    layers, clustered = _merged_layers(report), recipe["method"] == "mergemoe"
    errors = [layer["output_error"] for layer in layers if "output_error" in layer]
    calibration = report["calibration"]
    calibrated = f"{calibration['tokens']:,} tokens of {calibration['source']}" if calibration else "none"
    lines = [
        "---",
        "library_name: vllm",
        *([f"base_model: {report['source']}"] if _is_hub_id(report["source"]) else []),
        "tags: [moe, puzzlemoe, vllm, compressed]",
        "---",
        f"# {report['source'].rstrip('/').split('/')[-1]}, experts merged "
        + ("in clusters with MergeMoE" if clustered else "in pairs with PuzzleMoE"),
        "",
        f"Routed experts take {sizes['experts_after'] / GB:.2f} GB instead of {sizes['experts_before'] / GB:.2f} GB; "
        f"the other {sizes['other'] / GB:.2f} GB are unchanged.",
        "",
        "## Serve",
        f"With vLLM and its plugin puzzlemoe-vllm {report['tool_version']} installed:",
        "```",
        serve_command("THIS_FOLDER", family),
        "```",
        "Without the plugin vLLM answers `Unknown quantization method: puzzlemoe`. `puzzlemoe unpack THIS_FOLDER OUT`",
        "writes an ordinary bf16 checkpoint of the reconstructed weights for any other software.",
        "",
        "## How it was made",
        "| | |",
        "|---|---|",
        f"| source | {report['source']}{' @ ' + report['revision'] if report['revision'] else ''} |",
        *[f"| {key} | {value} |" for key, value in recipe.items()],
        f"| calibration | {calibrated} |",
        f"| layers with merged experts | {len(layers)} |",
        *([f"| relative error of the MoE layers' outputs, mean | {mean(errors):.4f} |"] if errors else []),
        f"| tool | puzzlemoe-vllm {report['tool_version']} |",
        "",
        f"Per-layer errors and token counts: `{REPORT}`. "
        + (
            "Its `centres` name the expert that serves for each of the source's."
            if clustered
            else "Experts were relabelled so that partners are neighbours; its `order` maps each new expert id to the "
            "source's."
        ),
        "",
    ]
    return "\n".join(lines)


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))
