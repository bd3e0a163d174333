"""Tiny models before and after the offline tool."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import models as tiny_models
from support.fp8 import write_fp8
from typer.testing import CliRunner

from puzzlemoe_offline.cli.main import app


@dataclass(frozen=True)
class Models:
    """A tiny model after `puzzlemoe compress`, and that after `puzzlemoe unpack`."""

    packed: Path
    unpacked: Path


def compress_and_unpack(
    folder: Path,
    family: str,
    sparsity: str,
    code: str,
    clusters: int | None,
    fp8: str | None = None,
    **overrides: Any,
) -> Models:
    """Both models of a family, below `folder`; overrides as `tiny_models.build` takes them.

    clusters: merge the experts into so many clusters, and not in pairs.  fp8: of a source in that form of FP8, whose
    linear layers outside experts the packed model keeps so.
    """
    source, text = tiny_models.build(family, folder / "source", **overrides), folder / "text"
    if fp8:
        source = write_fp8(source, folder / "source-fp8", fp8)
    text.write_text("".join(random.Random(0).choices(string.printable, k=2000)))
    result = Models(folder / "packed", folder / "unpacked")
    options = ["--calibration", str(text), "--samples", "8", "--sequence-length", "128"]
    pairs = ["--recipe", "paper", "--sparsity", sparsity, "--code", code]
    mergemoe = ["--method", "mergemoe", "--clusters", str(clusters)]
    options += mergemoe if clusters else pairs
    options += ["--dense", "fp8"] if fp8 else []
    for command in (
        ["compress", str(source), str(result.packed), *options, "--device", "cpu"],
        ["unpack", str(result.packed), str(result.unpacked)],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, (command, done.output, done.exception)
    return result
