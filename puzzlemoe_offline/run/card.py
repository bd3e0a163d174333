"""README.md of a written model: what it is, how to serve it, how it was made."""

from __future__ import annotations

import shlex
from statistics import mean

from rich.filesize import decimal

from puzzlemoe_offline.methods.base import LayerRecord
from puzzlemoe_offline.model.families import Family
from puzzlemoe_offline.run.job import Job
from puzzlemoe_offline.run.report import REPORT, Report, warnings, worst_expert


def serve_command(folder: str, family: Family) -> str:
    """What serves a packed model, as a shell reads it."""
    return f"vllm serve {shlex.quote(folder)}" + (" --trust-remote-code" if family.remote_config else "")


def model_card(job: Job, report: Report) -> str:
    """The card of a packed model, or of one whose experts are in bf16."""
    return _packed_card(job, report) if job.method.packs else _dense_card(job)


def _dense_card(job: Job) -> str:
    return f"{job.checkpoint.folder.name} in bf16 with its experts changed, by puzzlemoe-vllm: {job.method}.\n"


def _packed_card(job: Job, report: Report) -> str:
    sizes, layers = report.bytes, report.changed
    clustered = any(layer.centres for layer in layers)
    errors = [layer.output_error for layer in layers if layer.output_error is not None]
    calibration = report.calibration
    calibrated = f"{calibration['tokens']:,} tokens of {calibration['source']}" if calibration else "none"
    lines = [
        "---",
        "library_name: vllm",
        *([f"base_model: {report.source}"] if _is_hub_id(report.source) else []),
        "tags: [moe, puzzlemoe, vllm, compressed]",
        "---",
        f"# {report.source.rstrip('/').split('/')[-1]}, experts merged "
        + ("in clusters with MergeMoE" if clustered else "in pairs with PuzzleMoE"),
        "",
        f"Routed experts take {decimal(sizes.experts_after)} instead of {decimal(sizes.experts_before)}; "
        f"everything else: {sizes.other_text}.",
        "",
        "## Serve",
        f"With vLLM and its plugin puzzlemoe-vllm {report.tool_version} installed:",
        "```",
        serve_command("THIS_FOLDER", job.checkpoint.family),
        "```",
        "`Unknown quantization method: puzzlemoe` means that the plugin is not loaded: install it in the environment,",
        "image or every node that runs vLLM, and where `VLLM_PLUGINS` is set let it name `puzzlemoe`.",
        "`PUZZLEMOE_VERIFY=1` compares every byte of the weights with the digests that they were written with.",
        "",
        "transformers: `import puzzlemoe_vllm.transformers` before `from_pretrained`; experts then are dense.",
        "`puzzlemoe unpack THIS_FOLDER OUT` writes an ordinary bf16 checkpoint for any other software.",
        "",
        "## How it was made",
        "| | |",
        "|---|---|",
        f"| source | {report.source}{' @ ' + report.revision if report.revision else ''} |",
        *[f"| {key} | {value} |" for key, value in report.recipe.items()],
        f"| calibration | {calibrated} |",
        f"| layers with merged experts | {len(layers)} |",
        *([f"| relative error of the MoE layers' outputs, mean | {mean(errors):.4f} |"] if errors else []),
        *_worst_row(layers),
        f"| tool | puzzlemoe-vllm {report.tool_version} |",
        "",
        f"Per-layer errors and token counts: `{REPORT}`. "
        + (
            "Its `centres` name the expert that serves for each of the source's."
            if clustered
            else "Experts were relabelled so that partners are neighbours; its `order` maps each new expert id to the "
            "source's."
        ),
        "",
        *[f"Warning: {line}.\n" for line in warnings(report)],
    ]
    return "\n".join(lines)


def _worst_row(layers: list[LayerRecord]) -> list[str]:
    """The expert of the model that lost most."""
    worst = [(*found[::-1], layer.layer) for layer in layers if (found := worst_expert(layer))]
    if not worst:
        return []
    error, expert, layer = max(worst)
    return [f"| largest relative error of an expert | {error:.4f}, expert {expert} of the source's layer {layer} |"]


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))
