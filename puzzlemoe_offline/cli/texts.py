"""Texts that options name, as token windows of a model."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from torch import Tensor

from puzzlemoe_offline.calibration.text import Calibration, load_calibration
from puzzlemoe_offline.cli.options import OptionError
from puzzlemoe_offline.cli.terminal import errors
from puzzlemoe_offline.model.tokenizer import tokenizer_of
from puzzlemoe_offline.score.perplexity import windows_of


def calibration_of(folder: Path, source: str, samples: int, sequence_length: int, seed: int = 0) -> Calibration:
    """Calibration windows for the model in `folder`; says so on stderr when the source has fewer than asked for."""
    data = load_calibration(source, tokenizer_of(folder), samples, sequence_length, seed)
    if len(data.tokens) < samples:
        windows = len(data.tokens)
        errors.print(f"[yellow]{escape(source)} gives {windows} windows of {sequence_length}, not {samples}")
    return data


def windows_to_score(folder: Path, text: Path, sequence_length: int) -> Tensor:
    """All windows [n, T] of a text file.  Raises OptionError when it has none."""
    try:
        return windows_of(tokenizer_of(folder)(text.read_text(encoding="utf-8"))["input_ids"], sequence_length)
    except ValueError as error:
        raise OptionError(f"--text {text}: {error}; give a plain text file in UTF-8") from None
