"""The commands that compare with other ways to make experts smaller: `baseline` and `compare`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from puzzlemoe_offline.calibration.text import C4
from puzzlemoe_offline.cli.terminal import (
    DEFAULT_DEVICE,
    CalibrationOption,
    DeviceOption,
    RevisionOption,
    SamplesOption,
    WindowOption,
    calibration_of,
    console,
    errors,
    layer_progress,
    usable,
)
from puzzlemoe_offline.methods import METHODS
from puzzlemoe_offline.methods.base import BaselineError
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.hub import locate
from puzzlemoe_offline.model.tokenizer import tokenizer_of
from puzzlemoe_offline.run.report import MB
from puzzlemoe_offline.run.write_baseline import write_baseline
from puzzlemoe_offline.score.compare import CONTENDERS, TAU_SWEEP, Comparison, Contender, Row, results
from puzzlemoe_offline.score.distribution import expert_distribution
from puzzlemoe_offline.score.perplexity import spread, windows_of


def baseline_command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The dense model: a folder or a hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the dense model that comes of it.")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")],
    calibration: CalibrationOption = C4,
    samples: SamplesOption = 128,
    sequence_length: WindowOption = 2048,
    device: DeviceOption = DEFAULT_DEVICE,
    revision: RevisionOption = None,
) -> None:
    """Write an ordinary bf16 checkpoint of what another compression method makes of the experts, for comparison."""
    if method not in METHODS:
        raise BaselineError(f"--method {method}: unknown; choose one of {', '.join(METHODS)}")
    chosen = METHODS[method]
    folder = locate(source, revision)
    checkpoint = Checkpoint(folder)
    data = None if chosen.needs == "nothing" else calibration_of(folder, calibration, samples, sequence_length)
    with layer_progress(method, checkpoint.layers) as advance:
        write_baseline(checkpoint, chosen, data, usable(device), out, lambda layer: advance())
    console.print(
        f"dense model written to {out}; {method} itself would store {chosen.bits_per_weight(checkpoint):.3f} bits per "
        "expert weight",
        markup=False,
        soft_wrap=True,
    )


def compare_command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The dense model: a folder or a hub id.")],
    text: Annotated[list[Path], typer.Option(exists=True, dir_okay=False, help="A plain text file; repeatable.")],
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
    calibration: CalibrationOption = C4,
    samples: SamplesOption = 128,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens per window, of calibration and texts.")] = 2048,
    device: DeviceOption = DEFAULT_DEVICE,
    revision: RevisionOption = None,
    output: Annotated[
        Path, typer.Option(help="JSON file to write, with a PNG beside it; models in the making go to its folder.")
    ] = Path("compare.json"),
) -> None:
    """Perplexity and size of every recipe and of other compression methods, on your model and texts."""
    contenders = _chosen(only or [], tau_sweep)
    _check_output(output)
    folder = locate(source, revision)
    checkpoint = Checkpoint(folder)
    checkpoint.check_complete()
    if checkpoint.quantization:
        raise BaselineError(f"{folder} is packed already; compare starts from the 16-bit original")
    texts = _texts(text, tokenizer_of(folder), sequence_length, windows)
    data = calibration_of(folder, calibration, samples, sequence_length)
    comparison = Comparison(checkpoint, data, texts, usable(device), output.parent)
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


def draw_distribution(checkpoint: Checkpoint, folder: Path) -> None:
    """Draws exponents.png and similarity.png into a folder, which is made, and says so on stderr."""
    # matplotlib takes a second to import, which no other use of `inspect` should wait for.
    from puzzlemoe_offline.score.plots import draw_exponents, draw_similarity

    found = expert_distribution(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    name = checkpoint.folder.resolve().name
    draw_exponents(found, name, folder / "exponents.png")
    draw_similarity(found, name, folder / "similarity.png")
    errors.print(f"written: {folder / 'exponents.png'} and {folder / 'similarity.png'}", markup=False, soft_wrap=True)


def _check_output(output: Path) -> None:
    if not output.parent.is_dir():
        raise BaselineError(f"--output {output}: there is no folder {output.parent}")
    if output.suffix != ".json":
        raise BaselineError(f"--output {output}: name the .json file; the plot goes beside it as .png")


def _texts(
    paths: list[Path], tokenizer: PreTrainedTokenizerBase, sequence_length: int, count: int | None
) -> dict[str, Tensor]:
    """The windows to score of each text, by its file's name."""
    if len({path.stem for path in paths}) < len(paths):
        raise BaselineError("--text: two files have the same name, by which the table tells them apart; rename one")
    texts = {}
    for path in paths:
        try:
            ids = tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
            texts[path.stem] = spread(windows_of(ids, sequence_length), count)
        except ValueError as error:
            raise BaselineError(f"--text {path}: {error}; give a plain text file in UTF-8") from None
    return texts


def _chosen(only: list[str], tau_sweep: bool) -> Mapping[str, Contender]:
    if tau_sweep:
        if only:
            raise BaselineError("--tau-sweep runs the paper's rule alone: drop --only")
        return TAU_SWEEP
    for name in only:
        if name not in CONTENDERS:
            raise BaselineError(f"--only {name}: unknown; choose from {', '.join(CONTENDERS)}")
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
        taus = [TAU_SWEEP[row.name].tau for row in scored[1:]]
        draw_tau_sweep(scored, taus, f"{model}, the paper's rule", target)
    else:
        draw_comparison(scored, model, target)
