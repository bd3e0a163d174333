"""The `puzzlemoe` command."""

from __future__ import annotations

import os
import sys

# Progress bars of these libraries would tear ours; set before they are imported.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer
from rich.markup import escape
from transformers.utils import logging as transformers_logging

from puzzlemoe_offline.cli.baseline import baseline_command
from puzzlemoe_offline.cli.compare import compare_command
from puzzlemoe_offline.cli.compress import compress_command
from puzzlemoe_offline.cli.inspect import inspect_command
from puzzlemoe_offline.cli.options import with_recipe_options
from puzzlemoe_offline.cli.perplexity import perplexity_command
from puzzlemoe_offline.cli.terminal import errors
from puzzlemoe_offline.cli.unpack import unpack_command
from puzzlemoe_vllm.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.command("compress")(with_recipe_options(compress_command))
app.command("inspect")(inspect_command)
app.command("unpack")(unpack_command)
app.command("perplexity")(perplexity_command)
app.command("baseline")(baseline_command)
app.command("compare")(compare_command)


def main() -> None:
    """Entry point: expected errors become one line and exit status 1."""
    transformers_logging.set_verbosity_error()
    try:
        app()
    except UserError as error:
        # Not wrapped, and brackets are no markup: the text holds paths.
        errors.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
