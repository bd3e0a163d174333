"""The `puzzlemoe` command."""

from __future__ import annotations

import os
import sys
from typing import Annotated

# Progress bars of these libraries would tear ours; set before they are imported.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer
from rich.markup import escape
from transformers.utils import logging as transformers_logging

from puzzlemoe_offline.cli.baseline import baseline_command
from puzzlemoe_offline.cli.compare import compare_command
from puzzlemoe_offline.cli.compress import compress_command
from puzzlemoe_offline.cli.inspect import inspect_command
from puzzlemoe_offline.cli.interrupts import RESUME, Interrupted, can_resume, last_line, raising
from puzzlemoe_offline.cli.options import with_recipe_options
from puzzlemoe_offline.cli.perplexity import perplexity_command
from puzzlemoe_offline.cli.terminal import console, errors
from puzzlemoe_offline.cli.unpack import unpack_command
from puzzlemoe_offline.run.files import WriteError
from puzzlemoe_offline.run.stages import Stages
from puzzlemoe_offline.version import VERSION
from puzzlemoe_vllm.errors import UserError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"puzzlemoe-vllm {VERSION}", highlight=False)
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress Mixture-of-Experts models with PuzzleMoE, measure them, and turn them back into dense ones."""


app.command("compress")(with_recipe_options(compress_command))
app.command("inspect")(inspect_command)
app.command("unpack")(unpack_command)
app.command("perplexity")(perplexity_command)
app.command("baseline")(baseline_command)
app.command("compare")(compare_command)


def main(began: float | None = None) -> None:
    """Runs the command: expected errors become one line and exit status 1, a signal one line and its own status.

    began: `time.perf_counter()` of when the process began, if not now.
    """
    transformers_logging.set_verbosity_error()
    with raising():
        try:
            app(obj=Stages(began))
        except UserError as error:
            advice = f"; {RESUME}" if isinstance(error, WriteError) and can_resume() else ""
            _fail(f"{error}{advice}")
            sys.exit(1)
        except Interrupted as stop:
            _fail(last_line())
            sys.exit(stop.status)


def _fail(text: str) -> None:
    # Not wrapped, and brackets are no markup: the text holds paths.
    errors.print(f"[red]error:[/red] {escape(text)}", highlight=False, soft_wrap=True)
