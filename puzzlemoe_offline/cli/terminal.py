"""What commands print: consoles, the progress bar, and tables of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()
errors = Console(stderr=True)


@contextmanager
def layer_progress(title: str, layers: int) -> Iterator[Callable[..., None]]:
    """Shows a bar on stderr and gives the function that moves it on by a layer, whatever it is called with."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=errors) as progress:
        task = progress.add_task(title, total=layers)
        yield lambda *_: progress.advance(task)


def print_finished(out: Path) -> None:
    """Says that --resume had nothing left to do."""
    console.print(f"{out} was finished already: every shard is as it was written", markup=False, soft_wrap=True)
