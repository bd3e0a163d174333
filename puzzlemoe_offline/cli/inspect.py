"""`puzzlemoe inspect`: what a model folder holds, and whether it is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from puzzlemoe_offline.cli.options import Model
from puzzlemoe_offline.cli.terminal import console, errors
from puzzlemoe_offline.extras import require
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.hub import locate, open_by_headers
from puzzlemoe_offline.model.inspection import inspect
from puzzlemoe_offline.score.distribution import expert_distribution
from puzzlemoe_vllm.errors import shown

CHECKED = {
    "headers": "headers checked, weights not read: every tensor is present, with its shape and dtype",
    "values": "every tensor is present, well-formed and finite; the folder has no digests to compare it with",
    "digests": "every byte of every shard is as it was written; every tensor is present, well-formed and finite",
}
"""The last line, by what was checked."""


def inspect_command(
    model: Model,
    quick: Annotated[
        bool, typer.Option("--quick", help="Headers alone: no weights are read, so no damage to them is found.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plots: Annotated[
        Path | None,
        typer.Option(metavar="DIR", file_okay=False, help="Draw a dense model's exponents and similar entries."),
    ] = None,
) -> None:
    """Show what a packed or dense model holds and check that it is whole."""
    if plots:
        require("compare")
    checkpoint = open_by_headers(model)[0] if quick and not plots else Checkpoint(locate(model).folder)
    facts = inspect(checkpoint, quick)
    if plots:
        _draw(checkpoint, plots)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(title=escape(model))
    table.add_column("part")
    table.add_column("size", justify="right")
    for part, size in facts["bytes"].items():
        table.add_row(part, decimal(size))
    table.add_row("total", decimal(facts["total_bytes"]), style="bold")
    console.print(table)
    console.print(
        f"{facts['model_type']}: {facts['moe_layers']} of {facts['layers']} layers with "
        f"{facts['experts_per_layer']} experts, {facts['pairs']} pairs"
        + (f", {facts['clusters']} clusters" if facts["clusters"] else "")
        + (f", code {facts['code']}" if facts["code"] else "")
    )
    for part in facts["copied"]:
        console.print(f"{part}: as the source has it, {decimal(facts['bytes'][part])}")
    if facts["provenance"]:
        console.print(facts["provenance"])
    if changed := facts["changed_files"]:
        said = f"edited or gone since the model was written: {', '.join(map(shown, changed))}"
        console.print(said, style="yellow", markup=False, soft_wrap=True)
    console.print(CHECKED[facts["checked"]], soft_wrap=True)


def _draw(checkpoint: Checkpoint, folder: Path) -> None:
    """Draws exponents.png and similarity.png into a folder, which is made, and says so on stderr."""
    # matplotlib takes a second to import, which no other use of `inspect` should wait for.
    from puzzlemoe_offline.score.plots import draw_exponents, draw_similarity

    found = expert_distribution(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    name = checkpoint.folder.resolve().name
    draw_exponents(found, name, folder / "exponents.png")
    draw_similarity(found, name, folder / "similarity.png")
    errors.print(f"written: {folder / 'exponents.png'} and {folder / 'similarity.png'}", markup=False, soft_wrap=True)
