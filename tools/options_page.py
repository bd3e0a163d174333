"""Writes docs/options.md from the commands' options and the fields of recipes.

python tools/options_page.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from typer.models import ArgumentInfo, OptionInfo

from puzzlemoe_offline.cli.main import app
from puzzlemoe_offline.cli.options import PAIR_FIELDS, Code
from puzzlemoe_offline.recipe import NAMED, named_recipe

PAGE = Path(__file__).resolve().parent.parent / "docs" / "options.md"

HEAD = """# Options

Written by `python tools/options_page.py` from the commands themselves; `puzzlemoe COMMAND --help` says the same.
"""

RECIPE = """
## Recipes
`--recipe` names where the options of a recipe start from. An option that is given overrides it; one that cannot have an
effect, or contradicts another, is refused.
"""

ENVIRONMENT = """
## Environment
| variable | |
|---|---|
| `PUZZLEMOE_BACKEND` | serving: `cuda`, `triton` or `reference` insists on a backend, or says why it cannot serve |
| `PUZZLEMOE_FP8_PREFILL` | serving: `1` multiplies many tokens in FP8: `angle8`, `angle6`, compute capability 9.0 |
| `PUZZLEMOE_VERIFY` | serving: `1` compares every byte of the weights with their digests before it serves |
| `PUZZLEMOE_CUDA_LIBRARY` | serving: the file of the CUDA library, in place of the package's own |
| `PUZZLEMOE_BUILD_CUDA` | installing: `1` requires the CUDA library, `0` leaves it out; unset, nvcc decides |
"""


def cell(text: str) -> str:
    """Text as a cell of a table holds it."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join(lines + [f"| {' | '.join(cell(each) for each in row)} |" for row in rows])


def options(command: Callable[..., Any], left_out: Collection[str]) -> tuple[list[str], list[list[str]]]:
    """Metavars of a command's arguments, and rows of its options."""
    arguments, rows = [], []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if parameter.annotation is typer.Context:
            continue
        kind, info = parameter.annotation.__origin__, parameter.annotation.__metadata__[0]
        if isinstance(info, ArgumentInfo):
            arguments.append(str(info.metavar))
        elif name not in left_out:
            rows.append([flags(name, info), takes(kind, info), info.help or "", default(name, parameter, info)])
    return arguments, rows


def flags(name: str, info: OptionInfo) -> str:
    """An option as it is written.  In an annotation, typer.Option takes the first for a default."""
    declared = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str)]
    return ", ".join(f"`{flag}`" for flag in declared or [f"--{name.replace('_', '-')}"])


def takes(kind: Any, info: OptionInfo) -> str:
    """What stands after an option; nothing after a flag."""
    parts = [part for part in get_args(kind) if part is not type(None)] if not is_literal(kind) else []
    if info.metavar:
        return f"`{info.metavar}`"
    if parts:
        return takes(parts[0], info)
    if is_literal(kind):
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if issubclass(kind, StrEnum):
        return ", ".join(f"`{choice}`" for choice in kind)
    return {bool: "", int: "a number", float: "a number", Path: "a path"}.get(kind, "a text")


def is_literal(kind: Any) -> bool:
    """Whether a type lists its values."""
    return get_origin(kind) is Literal


def default(name: str, parameter: inspect.Parameter, info: OptionInfo) -> str:
    """What holds when an option is not given."""
    if isinstance(info.show_default, str):
        return info.show_default
    if name == "device":
        return "`cuda` where torch sees a GPU" if parameter.default is not None else ""
    if parameter.default is inspect.Parameter.empty:
        return "required"
    return "" if parameter.default in (None, False) else f"`{parameter.default}`"


def choices(name: str, kind: Any) -> str:
    """What a recipe's field takes."""
    return takes(Code if name == "code" else kind, OptionInfo())


def recipe_rows() -> list[list[str]]:
    """Rows of the fields of recipes for pairs, with what each named recipe says."""
    rows = []
    for name, field in PAIR_FIELDS.items():
        flag = f"--{name.replace('_', '-')}"
        both = f", `--no-{name.replace('_', '-')}`" if field.annotation is bool else ""
        values = [getattr(named_recipe(recipe), name) for recipe in NAMED]
        said = [f"`{value}`" if value is not None else "" for value in values]
        rows.append([f"`{flag}`{both}", choices(name, field.annotation), field.description or "", *said])
    return rows


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for registered in app.registered_commands:
        command, name = registered.callback, registered.name or registered.callback.__name__.removesuffix("_command")
        of_recipes = "recipe" in inspect.signature(command).parameters
        arguments, rows = options(command, PAIR_FIELDS if of_recipes else ())
        parts.append(f"\n## puzzlemoe {' '.join([name, *arguments])}\n{command.__doc__}\n\n")
        parts.append(table(["option", "takes", "", "default"], rows) + "\n")
        if of_recipes:
            parts.append("\nThose of a recipe for pairs are [below](#recipes).\n")
    parts += [
        RECIPE,
        "\n",
        table(["option", "takes", "", *(f"`{name}`" for name in NAMED)], recipe_rows()),
        "\n",
        ENVIRONMENT,
    ]
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
