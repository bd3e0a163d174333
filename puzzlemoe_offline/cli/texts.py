"""Texts that options name, as token windows of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from torch import Tensor

from puzzlemoe_offline.calibration.sources import parse_sources, shares
from puzzlemoe_offline.calibration.text import C4, Calibration, check_length, load_calibration, text_tokens
from puzzlemoe_offline.cli.options import OptionError
from puzzlemoe_offline.cli.terminal import errors
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.tokenizer import tokenizer_of
from puzzlemoe_offline.score.perplexity import windows_of

WINDOW = 2048
"""Tokens per window, where the model has so many positions."""


def window_length(checkpoint: Checkpoint, asked: int | None, spare: int = 0) -> int:
    """Tokens per window; where none is asked for, `spare` of the model's positions are left.

    Raises CalibrationError when more are asked for than the model has positions.
    """
    positions = checkpoint.positions
    check_length(asked or 0, positions)
    return asked or min(WINDOW, positions - spare if positions else WINDOW)


@dataclass(frozen=True)
class CalibrationText:
    """Calibration as the options have it, checked as far as it can be without reading.

    sources: None for C4.  length: of a window, in tokens.
    """

    sources: list[str]
    column: str | None
    samples: int
    length: int
    seed: int = 0

    @classmethod
    def checked(
        cls,
        checkpoint: Checkpoint,
        sources: list[str] | None,
        column: str | None,
        samples: int,
        sequence_length: int | None,
        seed: int = 0,
    ) -> CalibrationText:
        """Raises CalibrationError for sources that are none, and windows that the model has no positions for."""
        shares(parse_sources(sources or [C4]), samples)
        return cls(sources or [C4], column, samples, window_length(checkpoint, sequence_length), seed)

    @property
    def tokens(self) -> int:
        """As many as are asked for."""
        return self.samples * self.length

    def read(self, folder: Path) -> Calibration:
        """The windows, in the tokens of the model in `folder`; says on stderr what the sources did not give.

        Raises CalibrationError when a source cannot be used.
        """
        data = load_calibration(self.sources, tokenizer_of(folder), self.samples, self.length, self.seed, self.column)
        for source in data.sources:
            if source.windows < source.share:
                errors.print(
                    f"[yellow]{escape(source.name)} gives {source.windows} windows of {self.length}, not {source.share}"
                )
        if data.blank_rows:
            errors.print(f"[yellow]skipped {data.blank_rows} blank rows of the calibration text")
        return data


def windows_to_score(checkpoint: Checkpoint, text: Path, length: int, column: str | None = None) -> Tensor:
    """All windows [n, length] of a text file.

    Raises CalibrationError when it cannot be read, OptionError when it has fewer than two tokens.
    """
    ids = text_tokens(text, tokenizer_of(checkpoint.folder), column).ids
    if len(ids) < 2:
        raise OptionError(f"--text {text}: it has fewer than two tokens, and the first predicts nothing: give more")
    return windows_of(ids, length)
