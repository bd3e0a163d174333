"""The `puzzlemoe` command."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

# Progress bars of these libraries would tear ours; set before they are imported.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging as transformers_logging

from puzzlemoe_offline.calibration.text import C4, Calibration, CalibrationError
from puzzlemoe_offline.cli.compare import baseline_command, compare_command, draw_distribution
from puzzlemoe_offline.cli.terminal import (
    DEFAULT_DEVICE,
    CalibrationOption,
    Device,
    DeviceOption,
    Folder,
    RevisionOption,
    SamplesOption,
    WindowOption,
    calibration_of,
    console,
    errors,
    layer_progress,
    usable,
)
from puzzlemoe_offline.methods.base import BaselineError
from puzzlemoe_offline.methods.unpack import unpack
from puzzlemoe_offline.model.checkpoint import Checkpoint, CheckpointError
from puzzlemoe_offline.model.families import UnsupportedModel
from puzzlemoe_offline.model.hub import locate
from puzzlemoe_offline.model.inspection import inspect
from puzzlemoe_offline.model.layerwise import check_whole
from puzzlemoe_offline.model.tokenizer import tokenizer_of
from puzzlemoe_offline.recipe import (
    Code,
    Method,
    Pairing,
    Recipe,
    RecipeError,
    RecipeName,
    Rule,
    Saliency,
    named_recipe,
)
from puzzlemoe_offline.run.compress import Job, compress
from puzzlemoe_offline.run.output import OutputError, check_space
from puzzlemoe_offline.run.plan import disk_bytes, make_plan
from puzzlemoe_offline.run.report import GB, serve_command, summary
from puzzlemoe_offline.score.perplexity import perplexity, windows_of
from puzzlemoe_offline.score.served import ServingError, served_perplexity
from puzzlemoe_vllm.format.codes import UnencodableWeight
from puzzlemoe_vllm.format.layout import LayoutError

EXPECTED_ERRORS = (
    BaselineError,
    CalibrationError,
    CheckpointError,
    LayoutError,
    OutputError,
    RecipeError,
    ServingError,
    UnencodableWeight,
    UnsupportedModel,
)

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.command("baseline")(baseline_command)
app.command("compare")(compare_command)


class Engine(StrEnum):
    """What computes a perplexity."""

    layerwise = "layerwise"
    vllm = "vllm"


@app.command("compress")
def compress_command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The model to compress: a folder or a hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the packed model.")],
    context: typer.Context,
    method: Annotated[
        Method, typer.Option(help="puzzlemoe: in pairs, entry by entry; mergemoe: in clusters, each one expert.")
    ] = "puzzlemoe",
    experts: Annotated[int | None, typer.Option(help="mergemoe: experts that are left in every layer.")] = None,
    recipe: Annotated[
        RecipeName,
        typer.Option(help="Where the options below start from: what lost least when measured, or the paper's choices."),
    ] = "default",
    sparsity: Annotated[
        float | None,
        typer.Option(help="0.5 merges all experts of a layer, 0.25 the less used half.", show_default="0.5"),
    ] = None,
    code: Annotated[
        Code | None,
        typer.Option(help="Bits of a pair, and how they share a magnitude: by masks (the paper) or by directions."),
    ] = None,
    rule: Annotated[
        Rule | None, typer.Option(help="mask16: the paper's threshold and saliency, or least squares.")
    ] = None,
    compensate: Annotated[
        bool | None,
        typer.Option(
            "--compensate/--no-compensate",
            help="Push each expert's error in a column into its later ones, as GPTQ does.",
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="8- and 6-bit codes: input columns per step, 128, 64 or 32; smaller for small tensor-parallel shards.",
            show_default="the largest that fits",
        ),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Paper's rule: similarity threshold below which a pair shares its mean.",
            show_default="0.4",
        ),
    ] = None,
    pairing: Annotated[
        Pairing | None,
        typer.Option(
            help="Partners at random, those that lose least, or those that the same tokens choose most often."
        ),
    ] = None,
    saliency: Annotated[
        Saliency | None,
        typer.Option(
            help="wanda: |W| times the input column's norm; magnitude: |W|, no calibration.", show_default="wanda"
        ),
    ] = None,
    calibration: CalibrationOption = C4,
    samples: SamplesOption = 128,
    sequence_length: WindowOption = 2048,
    seed: Annotated[int, typer.Option(help="Seed of the random pairing and of the choice of calibration windows.")] = 0,
    device: DeviceOption = DEFAULT_DEVICE,
    revision: RevisionOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, peak memory and time; write nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run in OUT.")] = False,
) -> None:
    """Merge a model's experts in pairs and write a packed model that vLLM serves."""
    clusters = _mergemoe_recipe(context, method, experts)
    chosen = clusters or named_recipe(
        recipe,
        code=code,
        rule=rule,
        compensate=compensate,
        group_size=group_size,
        sparsity=sparsity,
        tau=tau,
        pairing=pairing,
        saliency=saliency,
        seed=seed,
    )
    folder = locate(source, revision)
    checkpoint = Checkpoint(folder)
    check_whole(checkpoint)
    data: Calibration | None = None
    if chosen.saliency == "wanda":
        data = calibration_of(folder, calibration, samples, sequence_length, seed)
    # What is written may be published: a folder here goes by its name.
    name = folder.resolve().name if Path(source).exists() else source
    job = Job(checkpoint, name, revision, chosen, data, usable(device))
    if dry_run:
        console.print(_plan_table(job))
        return
    check_space(out, disk_bytes(job))
    with layer_progress("compressing", checkpoint.layers) as advance:
        report = compress(job, out, resume, lambda layer, record: advance())
    console.print(summary(report))
    serve = serve_command(str(out), checkpoint.family)
    console.print(f"packed model written to {out}; serve it with: {serve}", markup=False, soft_wrap=True)


@app.command("inspect")
def inspect_command(
    model: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plots: Annotated[
        Path | None,
        typer.Option(metavar="DIR", file_okay=False, help="Draw a dense model's exponents and similar entries."),
    ] = None,
) -> None:
    """Show what a packed or dense model holds and check that it is whole."""
    checkpoint = Checkpoint(locate(model))
    facts = inspect(checkpoint)
    if plots:
        draw_distribution(checkpoint, plots)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(title=escape(model))
    table.add_column("part")
    table.add_column("GB", justify="right")
    for part, size in facts["bytes"].items():
        table.add_row(part, f"{size / GB:.3f}")
    table.add_row("total", f"{facts['total_bytes'] / GB:.3f}", style="bold")
    console.print(table)
    console.print(
        f"{facts['model_type']}: {facts['moe_layers']} of {facts['layers']} layers with "
        f"{facts['experts_per_layer']} experts, {facts['pairs']} pairs"
        + (f", {facts['clusters']} clusters" if facts["clusters"] else "")
        + (f", code {facts['code']}" if facts["code"] else "")
    )
    if facts["provenance"]:
        console.print(facts["provenance"])
    console.print("every tensor is present and well-formed, those of experts are finite")


@app.command("unpack")
def unpack_command(
    model: Folder, out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the dense model.")]
) -> None:
    """Write an ordinary dense bf16 checkpoint of a packed model's reconstructed weights."""
    checkpoint = Checkpoint(locate(model))
    with layer_progress("unpacking", checkpoint.layers) as advance:
        unpack(checkpoint, out, lambda layer: advance())
    console.print(f"dense model written to {out}", markup=False, soft_wrap=True)


@app.command("perplexity")
def perplexity_command(
    model: Folder,
    text: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="A plain text file.")],
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 2048,
    engine: Annotated[
        Engine, typer.Option(help="layerwise: one layer in memory at a time; vllm: the model as vLLM serves it.")
    ] = Engine.layerwise,
    device: Annotated[Device | None, typer.Option(help="Where layers run; vLLM chooses its own.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="vllm: let it run code that the folder brings (DeepSeek-MoE).")
    ] = False,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="vllm: share of the GPU's memory to take; its own default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a line.")] = False,
) -> None:
    """Perplexity of a packed or dense model on a text, in non-overlapping windows as is usual for WikiText-2."""
    folder = locate(model)
    checkpoint = Checkpoint(folder)
    check_whole(checkpoint)
    tokenizer = tokenizer_of(folder)
    try:
        windows = windows_of(tokenizer(text.read_text(encoding="utf-8"))["input_ids"], sequence_length)
    except ValueError as error:
        raise CheckpointError(f"--text {text}: {error}; give a plain text file in UTF-8") from None
    if engine is Engine.vllm:
        if device:
            raise CheckpointError("--device is for --engine layerwise; vLLM runs where its build runs: drop it")
        result = served_perplexity(folder, windows, trust_remote_code, gpu_memory_utilization)
    elif trust_remote_code or gpu_memory_utilization:
        raise CheckpointError("--trust-remote-code and --gpu-memory-utilization are for --engine vllm: drop them")
    else:
        with layer_progress("perplexity", checkpoint.layers) as advance:
            result = perplexity(checkpoint, windows, usable(device or DEFAULT_DEVICE), lambda layer: advance())
    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        console.print(
            f"perplexity {result.perplexity:.4f} over {result.tokens} tokens "
            f"({result.windows} windows of {result.sequence_length})"
        )


PAIR_OPTIONS = ("recipe", "sparsity", "code", "rule", "compensate", "group_size", "tau", "pairing", "saliency", "seed")
"""Options of `compress` that mergemoe has no use for."""


def _mergemoe_recipe(context: typer.Context, method: Method, experts: int | None) -> Recipe | None:
    """None for the other method."""
    if method == "puzzlemoe":
        if experts is not None:
            raise CheckpointError("--experts is for --method mergemoe; puzzlemoe has --sparsity")
        return None
    if experts is None:
        raise CheckpointError("--method mergemoe needs --experts, the number of experts left in every layer")
    for name in PAIR_OPTIONS:
        source = context.get_parameter_source(name)
        if source and source.name == "COMMANDLINE":
            raise CheckpointError(f"--{name.replace('_', '-')} is for --method puzzlemoe; mergemoe has --experts only")
    return Recipe(method="mergemoe", experts=experts)


def _plan_table(job: Job) -> Table:
    plan = make_plan(job)
    table = Table(title=f"{escape(job.source)}: plan (memory and time are estimates)", show_header=False)
    rows: list[tuple[str, Any]] = [
        ("expert weights", f"{plan.experts_before / GB:.3f} GB -> {plan.experts_after / GB:.3f} GB"),
        ("other weights", f"{plan.other / GB:.3f} GB, unchanged"),
        ("peak host memory", f"{plan.peak_host / GB:.2f} GB"),
        ("peak GPU memory", f"{plan.peak_device / GB:.2f} GB" if plan.peak_device else "none"),
        ("disk", f"{plan.disk / GB:.2f} GB"),
        ("time", f"{plan.seconds:.0f} s"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def main() -> None:
    """Entry point: expected errors become one line and exit status 1."""
    transformers_logging.set_verbosity_error()
    try:
        app()
    except EXPECTED_ERRORS as error:
        # Not wrapped, and brackets are no markup: the text holds paths.
        errors.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
