"""Calibration text as token windows."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from puzzlemoe_vllm.errors import UserError

C4 = "allenai/c4"
C4_SHARD = "en/c4-train.00000-of-01024.json.gz"


class CalibrationError(UserError):
    """Calibration text that cannot be used; the text says why."""


@dataclass(frozen=True)
class Calibration:
    """Token windows [samples, sequence_length] int64 and the digest that provenance records."""

    tokens: Tensor
    source: str

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()


def load_calibration(
    source: str, tokenizer: PreTrainedTokenizerBase, samples: int, sequence_length: int, seed: int = 0
) -> Calibration:
    """Token windows from a plain text file, a .jsonl file with a `text` field, or a hub dataset with a `text` column.

    A file is cut into as many equal parts as there are samples, and the seed chooses a window from each; a hub dataset
    is streamed until there are enough.
    Raises CalibrationError when the source is missing, malformed, or too short for one window.
    """
    path = Path(source)
    if path.is_file():
        tokens = torch.tensor([token for text in _file_texts(path) for token in tokenizer(text)["input_ids"]])
    elif path.exists() or path.suffix in (".txt", ".jsonl", ".json"):
        raise CalibrationError(f"{source}: not a file; give a text file, a .jsonl file or a hub dataset id")
    else:
        needed, ids = samples * sequence_length, []
        for text in _hub_texts(source):
            ids += tokenizer(text)["input_ids"]
            if len(ids) >= needed:
                break
        tokens = torch.tensor(ids[:needed])
    available = len(tokens) // sequence_length
    if available == 0:
        raise CalibrationError(
            f"{source} has {len(tokens)} tokens, fewer than one window of {sequence_length}: give more text or a "
            "smaller --sequence-length"
        )
    parts, rng = min(samples, available), random.Random(seed)
    chosen = [rng.randrange(part * available // parts, (part + 1) * available // parts) for part in range(parts)]
    # What is written may be published: a file goes by its name.
    name = path.name if path.is_file() else source
    return Calibration(tokens[: available * sequence_length].view(available, sequence_length)[chosen], name)


def _file_texts(path: Path) -> Iterator[str]:
    try:
        if path.suffix != ".jsonl":
            yield path.read_text(encoding="utf-8")
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                yield _text_field(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: {error}; give text in UTF-8") from None


def _text_field(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise CalibrationError(f'{where}: expected a JSON object with a "text" field that is a string')
    return text


def _hub_texts(dataset: str) -> Iterator[str]:
    from datasets import load_dataset

    try:
        files = {"train": C4_SHARD} if dataset == C4 else None
        for row in load_dataset(dataset, data_files=files, split="train", streaming=True):
            if "text" not in row:
                raise CalibrationError(f"{dataset}: its train split has no `text` column")
            yield row["text"]
    except CalibrationError:
        raise
    except Exception as error:  # datasets raises whatever its file system and builder layers raise
        raise CalibrationError(
            f"dataset {dataset} could not be read ({type(error).__name__}: {error}); "
            "give a local file with --calibration FILE"
        ) from None
