"""Text as tokens: windows to calibrate with, and texts to score."""

from __future__ import annotations

import hashlib
import random
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from puzzlemoe_offline.calibration.rows import CHATS, Row, file_rows, hub_rows
from puzzlemoe_offline.calibration.sources import (
    PLAIN,
    CalibrationError,
    HubDataset,
    TextFile,
    parse_origin,
    parse_sources,
    shares,
)
from puzzlemoe_vllm.errors import shown

C4 = "allenai/c4"
C4_SHARD = "en/c4-train.00000-of-01024.json.gz"

HUB_POOL = 4
"""Windows that are read of a hub dataset for each that is used: what the seed chooses from."""

_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles, beside from/value, as chat templates know them."""

_EXPECTED = {False: "a string or a list of messages", True: "a list of messages"}

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Tokens:
    """The ids, int64 [n], of a source's rows in their order, and how many rows were used and blank."""

    ids: Tensor
    rows: int
    blank_rows: int


@dataclass(frozen=True)
class SourceRecord:
    """What one source gave: of the samples asked of it (share) the windows that it had, and what was read for them."""

    name: str
    share: int
    windows: int
    tokens: int
    rows: int
    blank_rows: int


@dataclass(frozen=True)
class Calibration:
    """Token windows [samples, sequence_length] int64, and what provenance records: their digest and sources."""

    tokens: Tensor
    source: str
    sources: tuple[SourceRecord, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()

    @property
    def blank_rows(self) -> int:
        """Rows that hold nothing or only white space, which were skipped."""
        return sum(record.blank_rows for record in self.sources)


def load_calibration(
    source: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    sequence_length: int,
    seed: int = 0,
    column: str | None = None,
    max_positions: int | None = None,
) -> Calibration:
    """Token windows of one or several sources, each SOURCE or SOURCE=WEIGHT as `parse_source` reads it.

    Samples are shared out by weight.  A source's tokens are cut into as many equal parts as its share, and the seed
    chooses a window from each; of a file these are all its tokens, of a hub dataset the first HUB_POOL times as many as
    are used.
    column: of sources that have columns; `text`, else `messages` or `conversations`, if not given.  A string is text, a
    list is a chat and goes through the tokenizer's chat template.  Blank rows are skipped and counted.
    max_positions: the model's max_position_embeddings.
    Raises CalibrationError for windows longer than that, and when a source is missing, malformed or too short for one
    window.
    """
    check_length(sequence_length, max_positions)
    sources = parse_sources([source] if isinstance(source, str) else source)
    if column and all(isinstance(each.origin, TextFile) and each.origin.format == PLAIN for each in sources):
        raise CalibrationError(f"{sources[0].origin} is plain text and has no columns: drop --column")
    windows, records = [], []
    for each, share in zip(sources, shares(sources, samples), strict=True):
        limit = HUB_POOL * share * sequence_length if isinstance(each.origin, HubDataset) else None
        read = _tokens(_rows(each.origin, column), tokenizer, limit)
        chosen = _choose(read.ids, share, sequence_length, seed)
        if not len(chosen):
            raise CalibrationError(
                f"{each.origin} has {len(read.ids)} tokens, fewer than one window of {sequence_length}: give more text "
                "or a smaller --sequence-length"
            )
        windows.append(chosen)
        records.append(SourceRecord(each.origin.name, share, len(chosen), len(read.ids), read.rows, read.blank_rows))
    names = [record.name if len(records) == 1 else f"{record.name} ({record.windows})" for record in records]
    return Calibration(torch.cat(windows), ", ".join(names), tuple(records))


def text_tokens(source: str | Path, tokenizer: PreTrainedTokenizerBase, column: str | None = None) -> Tokens:
    """The tokens of a whole file, to be scored; formats and columns as for `load_calibration`.

    Each row is tokenized on its own.  Raises CalibrationError when it cannot be read.
    """
    origin = parse_origin(str(source))
    if isinstance(origin, HubDataset):
        raise CalibrationError(f"{origin}: no such file; texts to score are local files")
    return _tokens(file_rows(origin, column), tokenizer)


def check_length(sequence_length: int, max_positions: int | None) -> None:
    """Raises CalibrationError when windows are longer than the model's positions, where it has so many."""
    if max_positions is not None and sequence_length > max_positions:
        raise CalibrationError(
            f"--sequence-length {sequence_length} is longer than the model's {max_positions} positions "
            f"(max_position_embeddings): give --sequence-length {max_positions} or less"
        )


def _rows(origin: TextFile | HubDataset, column: str | None) -> Iterator[Row]:
    if isinstance(origin, TextFile):
        return file_rows(origin, column)
    # All of C4 has 356 files, which would be listed first.
    one_shard = origin.id == C4 and origin.config is None and origin.split == "train"
    return hub_rows(origin, column, {"train": C4_SHARD} if one_shard else None)


def _tokens(rows: Iterator[Row], tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> Tokens:
    """limit: stop at so many tokens."""
    ids, used, blank = array("q"), 0, 0
    for where, column, value in rows:
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            blank += 1
            continue
        used += 1
        ids.extend(_row_ids(tokenizer, where, column, value))
        if limit is not None and len(ids) >= limit:
            break
    found = torch.frombuffer(ids, dtype=torch.int64) if ids else torch.empty(0, dtype=torch.int64)
    return Tokens(found[:limit], used, blank)


def _choose(ids: Tensor, count: int, sequence_length: int, seed: int) -> Tensor:
    """Up to `count` windows [n, sequence_length] of ids [m], one from each of `count` equal parts."""
    available = len(ids) // sequence_length
    parts, rng = min(count, available), random.Random(seed)
    chosen = [rng.randrange(part * available // parts, (part + 1) * available // parts) for part in range(parts)]
    return ids[: available * sequence_length].view(available, sequence_length)[chosen]


def _row_ids(tokenizer: PreTrainedTokenizerBase, where: str, column: str, value: Any) -> list[int]:
    if isinstance(value, str) and column not in CHATS:
        _check_surrogates(value, where)
        # A text longer than the model's context is no fault here: windows are cut from it.
        ids: list[int] = tokenizer(value, verbose=False)["input_ids"]
        return ids
    if not isinstance(value, list):
        raise CalibrationError(
            f"{where}: {shown(column, 30)} is of type {type(value).__name__}, not {_EXPECTED[column in CHATS]}; "
            "mend the row or choose another column with --column NAME"
        )
    messages = [_message(message, f"{where}: {shown(column, 30)}[{index}]") for index, message in enumerate(value)]
    if tokenizer.chat_template is None:
        raise CalibrationError(
            f"{where} is a chat, and the model's tokenizer has no chat template: give plain text, or another column "
            "with --column NAME"
        )
    try:
        ids = tokenizer.apply_chat_template(messages, return_dict=False, tokenizer_kwargs={"verbose": False})
    except Exception as error:  # templates raise whatever they like
        raise CalibrationError(
            f"{where}: the tokenizer's chat template refuses this chat ({shown(' '.join(str(error).split()))}): mend "
            "or drop the row"
        ) from None
    return ids


def _message(message: Any, where: str) -> dict[str, Any]:
    """One message of a chat in the spelling of chat templates, from role and content or from `from` and `value`."""
    if isinstance(message, dict):
        # Parquet and the hub write None for the keys that a message lacks.
        fields = {key: value for key, value in message.items() if value is not None}
        if "role" not in fields and "from" in fields:
            role = fields.pop("from")
            fields |= {"role": _ROLES.get(role, role) if isinstance(role, str) else role}
            fields |= {"content": fields.pop("value", None)}
        if isinstance(fields.get("role"), str) and isinstance(fields.get("content"), str):
            for text in (fields["role"], fields["content"]):
                _check_surrogates(text, where)
            return fields
    raise CalibrationError(f"{where}: expected a message with role and content, or from and value, that are strings")


def _check_surrogates(text: str, where: str) -> None:
    if found := _SURROGATE.search(text):
        raise CalibrationError(f"{where} holds half a character ({found[0]!r}, a lone surrogate): mend or drop the row")
