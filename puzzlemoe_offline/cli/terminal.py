"""What the commands share: consoles, their common options, and the progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from puzzlemoe_offline.calibration.text import Calibration, load_calibration
from puzzlemoe_offline.model.checkpoint import CheckpointError
from puzzlemoe_offline.model.tokenizer import tokenizer_of

console = Console()
errors = Console(stderr=True)


class Device(StrEnum):
    """Where layers are run and merged."""

    cpu = "cpu"
    cuda = "cuda"


DEFAULT_DEVICE = Device.cuda if torch.cuda.is_available() else Device.cpu

Folder = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a hub id.")]
DeviceOption = Annotated[Device, typer.Option(help="Where layers run.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
CalibrationOption = Annotated[
    str, typer.Option(help="Plain text file, .jsonl file with a text field, or hub dataset with a text column.")
]
SamplesOption = Annotated[int, typer.Option(min=1, help="Calibration windows.")]
WindowOption = Annotated[int, typer.Option(min=8, help="Tokens per calibration window.")]


def usable(device: Device) -> str:
    """The device as torch names it.  Raises CheckpointError when there is none."""
    if device is Device.cuda and not torch.cuda.is_available():
        raise CheckpointError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    return device.value


def calibration_of(folder: Path, source: str, samples: int, sequence_length: int, seed: int = 0) -> Calibration:
    """Calibration windows for the model in `folder`; says so on stderr when the source has fewer than asked for."""
    data = load_calibration(source, tokenizer_of(folder), samples, sequence_length, seed)
    if len(data.tokens) < samples:
        windows = len(data.tokens)
        errors.print(f"[yellow]{escape(source)} gives {windows} windows of {sequence_length}, not {samples}")
    return data


@contextmanager
def layer_progress(title: str, layers: int) -> Iterator[Callable[[], None]]:
    """Shows a bar on stderr and gives the function that moves it on by a layer."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=errors) as progress:
        task = progress.add_task(title, total=layers)
        yield lambda: progress.advance(task)
