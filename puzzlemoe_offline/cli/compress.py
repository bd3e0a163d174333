"""`puzzlemoe compress`: a packed model of a dense one."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from puzzlemoe_offline.cli.options import (
    CLUSTER_FIELDS,
    DEFAULT_DEVICE,
    DEFAULT_SAMPLES,
    PAIR_FIELDS,
    CalibrationOption,
    ColumnOption,
    DeviceOption,
    OptionError,
    OutFolder,
    ResumeOption,
    RevisionOption,
    SamplesOption,
    SourceModel,
    WindowOption,
)
from puzzlemoe_offline.cli.sources import with_weights
from puzzlemoe_offline.cli.terminal import console, layer_progress, print_finished
from puzzlemoe_offline.cli.texts import CalibrationText
from puzzlemoe_offline.methods.base import LayerMethod
from puzzlemoe_offline.methods.mergemoe import MergeMoe
from puzzlemoe_offline.methods.pairs import PairMethod
from puzzlemoe_offline.model.fp8_layers import fp8_weights
from puzzlemoe_offline.model.hub import open_by_headers
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.recipe import (
    Bits,
    ClusterRecipe,
    MethodName,
    RecipeError,
    RecipeName,
    code_of_bits,
    named_recipe,
    reason,
)
from puzzlemoe_offline.run.card import serve_command
from puzzlemoe_offline.run.job import Job
from puzzlemoe_offline.run.plan import Plan, make_plan
from puzzlemoe_offline.run.report import summary
from puzzlemoe_offline.run.runner import check, run
from puzzlemoe_offline.run.stages import Stages


class Dense(StrEnum):
    """What linear layers outside experts are written in."""

    bf16 = "bf16"
    fp8 = "fp8"


def compress_command(
    context: typer.Context,
    source: SourceModel,
    out: OutFolder,
    method: Annotated[
        MethodName, typer.Option(help="puzzlemoe: in pairs, entry by entry; mergemoe: in clusters, each one expert.")
    ] = "puzzlemoe",
    recipe: Annotated[
        RecipeName | None,
        typer.Option(
            help="Where the options below start from: what lost least when measured, or the paper's choices.",
            show_default="default",
        ),
    ] = None,
    bits: Annotated[
        Bits | None,
        typer.Option(
            help="Bits per weight of experts, steps aside, by the code that loses least at that.",
            show_default="the recipe's",
        ),
    ] = None,
    *,
    recipe_fields: dict[str, Any],
    calibration: CalibrationOption = None,
    column: ColumnOption = None,
    samples: SamplesOption = DEFAULT_SAMPLES,
    sequence_length: WindowOption = None,
    dense: Annotated[
        Dense,
        typer.Option(
            help="Linear layers outside experts: bf16, or FP8 by blocks of 128 x 128, the source's where it has that."
        ),
    ] = Dense.bf16,
    device: DeviceOption = DEFAULT_DEVICE,
    revision: RevisionOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, peak memory and time; write nothing.")
    ] = False,
    resume: ResumeOption = False,
) -> None:
    """Merge a model's experts and write a packed model that vLLM serves."""
    stages = context.find_object(Stages) or Stages()
    chosen = chosen_method(method, recipe, bits, recipe_fields)
    planned, commit = open_by_headers(source, revision)
    seed = recipe_fields.get("seed", 0)
    text = CalibrationText.checked(planned, calibration, column, samples, sequence_length, seed)
    # What is written may be published: a folder here goes by its name.
    name = planned.folder.resolve().name if commit is None else source
    tokens = text.tokens if chosen.passes else 0
    fp8 = fp8_weights(planned) if dense is Dense.fp8 else frozenset()
    job = Job(LayerwiseModel(planned, device.usable()), chosen, name, commit, tokens, fp8)
    check(job, out, resume)
    if dry_run:
        console.print(_plan_table(job))
        return
    job = with_weights(job, source)
    stages.end("start")
    data = text.read(job.checkpoint.folder) if chosen.passes else None
    stages.end("text")
    with layer_progress("compressing", job.checkpoint.layers) as advance:
        report = run(job, data, out, resume, advance, stages)
    if report is None:
        print_finished(out)
    else:
        console.print(summary(report))
    serve = serve_command(str(out), job.checkpoint.family)
    console.print(f"packed model written to {out}; serve it with: {serve}", markup=False, soft_wrap=True)


def chosen_method(
    method: MethodName, recipe: RecipeName | None, bits: Bits | None, fields: dict[str, Any]
) -> LayerMethod:
    """The method with its recipe.  Raises OptionError for a field of the other method, RecipeError for a contradiction.

    fields: of either method's recipe, those that were given.
    """
    other = CLUSTER_FIELDS if method == "puzzlemoe" else PAIR_FIELDS
    foreign = [name for name in fields if name in other]
    if method == "mergemoe":
        foreign += [name for name, value in (("recipe", recipe), ("bits", bits)) if value]
    if foreign:
        owner = "mergemoe" if method == "puzzlemoe" else "puzzlemoe"
        raise OptionError(f"--{foreign[0].replace('_', '-')} is for --method {owner}: drop it, or choose that")
    if method == "puzzlemoe":
        chosen = {"code": code_of_bits(bits, fields.get("code"))} if bits else {}
        return PairMethod(named_recipe(recipe or "default", **(fields | chosen)))
    if "clusters" not in fields:
        raise OptionError("--method mergemoe needs --clusters, the number of experts left in every layer")
    try:
        return MergeMoe(ClusterRecipe(**fields))
    except ValidationError as error:
        raise RecipeError(reason(error)) from None


def _plan_table(job: Job) -> Table:
    plan = make_plan(job)
    table = Table(title=f"{escape(job.source)}: plan (memory and time are estimates)", show_header=False)
    rows = [
        ("expert weights", plan.sizes.experts_text),
        ("other weights", plan.sizes.other_text),
        ("peak host memory", decimal(plan.peak_host)),
        ("peak GPU memory", _gpu_memory(plan)),
        ("disk", decimal(plan.disk)),
        ("time", f"{plan.seconds:.0f} s"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def _gpu_memory(plan: Plan) -> str:
    if not plan.peak_device:
        return "none"
    return decimal(plan.peak_device) + (f", on the first of {plan.devices}" if plan.devices > 1 else "")
