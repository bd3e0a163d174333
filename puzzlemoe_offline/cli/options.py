"""Options that commands share; those of a recipe are made from its fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic.fields import FieldInfo

from puzzlemoe_offline.calibration.text import C4
from puzzlemoe_offline.recipe import ClusterRecipe, PairRecipe
from puzzlemoe_vllm.errors import UserError
from puzzlemoe_vllm.format.codes import CODES


class OptionError(UserError):
    """An option that cannot be used so; the text names it and the way out."""


class Device(StrEnum):
    """Where layers are run and merged."""

    cpu = "cpu"
    cuda = "cuda"

    def usable(self) -> str:
        """The device as torch names it.  Raises OptionError when there is none."""
        if self is Device.cuda and not torch.cuda.is_available():
            raise OptionError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
        return self.value


DEFAULT_DEVICE = Device.cuda if torch.cuda.is_available() else Device.cpu

SourceModel = Annotated[str, typer.Argument(metavar="SRC", help="The dense model: a folder or a hub id.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a hub id.")]
OutFolder = Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the model that comes of it.")]
DeviceOption = Annotated[Device, typer.Option(help="Where layers are merged; cuda: all visible GPUs of one kind.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run in OUT.")]
CalibrationOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SOURCE[=WEIGHT]",
        help="Text, JSON, CSV, TSV or Parquet file, compressed or not, or a hub dataset owner/name[:config[:split]]; "
        "repeatable, samples are shared out by weight.",
        show_default=C4,
    ),
]
ColumnOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Column of sources that have columns.", show_default="text, messages or conversations"
    ),
]
SamplesOption = Annotated[int, typer.Option(min=1, help="Calibration windows.")]
WindowOption = Annotated[
    int | None,
    typer.Option(min=8, help="Tokens per window.", show_default="2048, or all positions of a model with fewer"),
]
TextOption = Annotated[
    Path, typer.Option(exists=True, dir_okay=False, help="A file in any of the formats that calibration takes.")
]

DEFAULT_SAMPLES = 128

Code = StrEnum("Code", {name: name for name in CODES})  # type: ignore[misc]

PAIR_FIELDS = {name: field for name, field in PairRecipe.model_fields.items() if name != "method"}
CLUSTER_FIELDS = {name: field for name, field in ClusterRecipe.model_fields.items() if name != "method"}


def with_recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `recipe_fields` gets the fields of recipes that were given, by name, as options."""
    names = [*PAIR_FIELDS, *CLUSTER_FIELDS]

    def run(*args: Any, **given: Any) -> None:
        fields = {name: value for name in names if (value := given.pop(name)) is not None}
        command(*args, recipe_fields=fields, **given)

    own = inspect.signature(command, eval_str=True)
    parameters = []
    for parameter in own.parameters.values():
        if parameter.name == "recipe_fields":
            parameters += [_option(name, field) for name, field in (PAIR_FIELDS | CLUSTER_FIELDS).items()]
        else:
            parameters.append(parameter)
    run.__doc__ = command.__doc__
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    """A recipe's field as an option that is None when it is not given: the recipe then says what it is."""
    flag = f"--{name.replace('_', '-')}"
    kind: Any = Code if name == "code" else field.annotation
    declared = (f"{flag}/--no-{name.replace('_', '-')}",) if kind is bool else (flag,)
    option = typer.Option(*declared, help=field.description)
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
