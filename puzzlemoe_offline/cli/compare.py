"""`puzzlemoe compare`: recipes and other ways to make experts smaller, on one model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from torch import Tensor

from puzzlemoe_offline.cli.options import (
    DEFAULT_DEVICE,
    DEFAULT_SAMPLES,
    CalibrationOption,
    ColumnOption,
    DeviceOption,
    OptionError,
    RevisionOption,
    SamplesOption,
    SourceModel,
    WindowOption,
)
from puzzlemoe_offline.cli.terminal import console, errors
from puzzlemoe_offline.cli.texts import CalibrationText, windows_to_score
from puzzlemoe_offline.extras import require
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.hub import locate, open_by_headers
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.run.report import MB
from puzzlemoe_offline.score.compare import CONTENDERS, TAU_SWEEP, Comparison, Contender, Row, results
from puzzlemoe_offline.score.perplexity import spread


def compare_command(
    source: SourceModel,
    text: Annotated[
        list[Path], typer.Option(exists=True, dir_okay=False, help="A file as calibration takes them; repeatable.")
    ],
    only: Annotated[
        list[str] | None, typer.Option(help=f"Run only this one; repeatable. Of {', '.join(CONTENDERS)}.")
    ] = None,
    tau_sweep: Annotated[
        bool, typer.Option("--tau-sweep", help="The paper's rule at tau from 0 to 1 in place of the comparison.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every recipe with random pairs; mean and spread.")] = 1,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Score this many windows of each text, spread over it; all if not given.")
    ] = None,
    calibration: CalibrationOption = None,
    column: ColumnOption = None,
    samples: SamplesOption = DEFAULT_SAMPLES,
    sequence_length: WindowOption = None,
    device: DeviceOption = DEFAULT_DEVICE,
    revision: RevisionOption = None,
    output: Annotated[
        Path, typer.Option(help="JSON file to write, with a PNG beside it; models in the making go to its folder.")
    ] = Path("compare.json"),
) -> None:
    """Perplexity and size of every recipe and of other compression methods, on your model and texts."""
    require("compare")
    contenders = _chosen(only or [], tau_sweep)
    _check_output(output)
    planned, commit = open_by_headers(source, revision)
    if planned.quantization:
        raise OptionError(f"{planned.folder} is packed already; compare starts from the 16-bit original")
    to_calibrate = CalibrationText.checked(planned, calibration, column, samples, sequence_length)
    if planned.folder.resolve() in output.resolve().parents:
        raise OptionError(f"--output {output}: lies inside the source, and so would models in the making: name another")
    checkpoint = planned if planned.has_weights else Checkpoint(locate(source, commit).folder)
    model = LayerwiseModel(checkpoint, device.usable())
    folder = checkpoint.folder
    texts = _texts(checkpoint, text, to_calibrate.length, windows)
    data = to_calibrate.read(folder)
    comparison = Comparison(model, data, texts, output.parent)
    figure = output.with_suffix(".png")
    rows: list[Row] = []
    # On a large model this takes hours: what is measured is written at once.
    for row in comparison.rows(contenders, seeds):
        rows.append(row)
        said = row.refused or ", ".join(f"{name} {row.mean(name):.3f}" for name in texts)
        errors.print(f"{row.name}: {said}", markup=False, soft_wrap=True)
        output.write_text(json.dumps(results(comparison, rows, seeds), indent=2) + "\n", encoding="utf-8")
        _draw(rows, tau_sweep, folder.resolve().name, figure)
    console.print(_table(rows, list(texts)))
    console.print(f"written: {output} and {figure}", markup=False, soft_wrap=True)


def _check_output(output: Path) -> None:
    if not output.parent.is_dir():
        raise OptionError(f"--output {output}: there is no folder {output.parent}")
    if output.suffix != ".json":
        raise OptionError(f"--output {output}: name the .json file; the plot goes beside it as .png")


def _texts(checkpoint: Checkpoint, paths: list[Path], sequence_length: int, count: int | None) -> dict[str, Tensor]:
    """The windows to score of each text, by its file's name."""
    if len({path.stem for path in paths}) < len(paths):
        raise OptionError("--text: two files have the same name, by which the table tells them apart; rename one")
    return {path.stem: spread(windows_to_score(checkpoint, path, sequence_length), count) for path in paths}


def _chosen(only: list[str], tau_sweep: bool) -> Mapping[str, Contender]:
    if tau_sweep:
        if only:
            raise OptionError("--tau-sweep runs the paper's rule alone: drop --only")
        return {f"tau {tau}": contender for tau, contender in TAU_SWEEP.items()}
    for name in only:
        if name not in CONTENDERS:
            raise OptionError(f"--only {name}: unknown; choose from {', '.join(CONTENDERS)}")
    return {name: contender for name, contender in CONTENDERS.items() if not only or name in only}


def _table(rows: list[Row], texts: list[str]) -> Table:
    table = Table(title="Perplexity, and its rise over the dense model")
    table.add_column("recipe")
    for column in ("bits per expert weight", "expert MB", *texts):
        table.add_column(column, justify="right")
    for row in rows:
        if row.refused:
            table.add_row(row.name, "-", "-", *["does not fit"] * len(texts))
            continue
        scores = [_score(row, rows[0], text) for text in texts]
        table.add_row(row.name, f"{row.bits_per_weight:.3f}", f"{row.expert_bytes / MB:,.1f}", *scores)
    return table


def _score(row: Row, dense: Row, text: str) -> str:
    value, base = row.mean(text), dense.mean(text)
    if row is dense:
        return f"{value:.3f}"
    spread = f" ± {row.spread(text) / base:.2%}" if len(row.perplexity[text]) > 1 else ""
    return f"{value:.3f} ({value / base - 1:+.2%}{spread})"


def _draw(rows: list[Row], tau_sweep: bool, model: str, target: Path) -> None:
    # matplotlib takes a second to import, which no other command should wait for.
    from puzzlemoe_offline.score.plots import draw_comparison, draw_tau_sweep

    scored = [row for row in rows if not row.refused]
    if tau_sweep:
        taus = [float(row.name.removeprefix("tau ")) for row in scored[1:]]
        draw_tau_sweep(scored, taus, f"{model}, the paper's rule", target)
    else:
        draw_comparison(scored, model, target)
