"""What commands print: consoles, the progress bar, and tables of models."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_WIDTH = 120
"""Characters of a line in a file or a pipe, unless COLUMNS says otherwise: rich would break tables at 80."""

LOG_SECONDS = 30
"""Between lines of progress in a file or a pipe."""


def _width(terminal: bool) -> int | None:
    return None if terminal or "COLUMNS" in os.environ else LOG_WIDTH


console = Console(width=_width(sys.stdout.isatty()))
errors = Console(stderr=True, width=_width(sys.stderr.isatty()))


@contextmanager
def layer_progress(title: str, layers: int) -> Iterator[Callable[..., None]]:
    """Shows a bar on stderr and gives the function that moves it on by a layer, whatever it is called with.  Where no
    terminal would redraw it, a line says now and then how far it is."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=errors) as progress:
        task, said = progress.add_task(title, total=layers), time.monotonic()

        def advance(*_: object) -> None:
            nonlocal said
            progress.advance(task)
            if not errors.is_terminal and time.monotonic() - said >= LOG_SECONDS:
                said = time.monotonic()
                errors.print(progress.get_renderable())

        yield advance


def print_finished(out: Path) -> None:
    """Says that --resume had nothing left to do."""
    console.print(f"{out} was finished already: every shard is as it was written", markup=False, soft_wrap=True)
