"""The rows of text files and hub datasets, one column of each.

Files go through the standard library's and Arrow's readers and not through `datasets`: its builders guess types, so
that the texts 2020-01-01, 007 and NA come back as a date, a number and nothing, they fill a missing column with None,
and they name no line.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from puzzlemoe_offline.calibration.sources import CSV, JSON, PARQUET, PLAIN, CalibrationError, HubDataset, TextFile
from puzzlemoe_vllm.errors import shown

CHATS = ("messages", "conversations")
"""Columns that hold a list of messages."""

COLUMNS = ("text", *CHATS)
"""The columns that are looked for, in this order, where none is asked for."""

Row = tuple[str, str, Any]
"""Where a row is, as messages say it, the column that was read, and its value."""

# What errors="surrogateescape" makes of bytes that are no UTF-8, and NUL bytes.
_NOT_TEXT = re.compile("[\0\udc80-\udcff]")
_PARQUET_BATCH = 256


def file_rows(file: TextFile, column: str | None) -> Iterator[Row]:
    """The rows of a file; plain text is one row, `text`, and a blank line of JSON Lines or CSV is one too.

    Raises CalibrationError, with the line or row where it can be known, for what is no text in UTF-8 or malformed, and
    where there is no `column` or, if that is None, none of COLUMNS.
    """
    try:
        if file.format == PARQUET:
            yield from _parquet_rows(file, column)
            return
        with _OPENERS[file.compression](file.path) as stream:
            if file.format == PLAIN:
                yield str(file), "text", "".join(line for _, line in _lines(file, stream))
            elif file.format == JSON:
                yield from _json_rows(file, _lines(file, stream), column)
            else:
                yield from _separated_rows(file, stream, column)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        refused = isinstance(error, OSError) and error.strerror
        reason = refused or f"{shown(error)}; it may be damaged or cut short: write or fetch it again"
        raise CalibrationError(f"{file} could not be read: {reason}") from None


def hub_rows(dataset: HubDataset, column: str | None, data_files: dict[str, str] | None) -> Iterator[Row]:
    """The rows of a hub dataset's split, streamed; data_files: those of its files to read, by split, or all.

    Raises CalibrationError when it cannot be read, and for columns as `file_rows`.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(dataset.id, dataset.config, data_files=data_files, split=dataset.split, streaming=True)
        for number, row in enumerate(rows, 1):
            where = f"{dataset} row {number}"
            chosen = _column(row, column, where)
            yield where, chosen, row[chosen]
    except CalibrationError:
        raise
    except Exception as error:  # datasets raises whatever its file system and builder layers raise
        reason = shown(" ".join(f"{type(error).__name__}: {error}".split()), 130)
        raise CalibrationError(
            f"dataset {dataset} could not be read ({reason}), and there is no file of that name: name it as "
            "owner/name[:config[:split]], or give a local file"
        ) from None


def _column(names: Collection[str], asked: str | None, where: str) -> str:
    for name in [asked] if asked else COLUMNS:
        if name in names:
            return name
    listed = ", ".join(shown(name, 18) for name in list(names)[:5]) or "none"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    raise CalibrationError(
        f"{where} has no column {shown(asked or 'text', 30)}; there are: {listed}{more}; choose one with --column NAME"
    )


def _zstd(path: Path) -> pa.CompressedInputStream:
    return pa.CompressedInputStream(path.open("rb"), "zstd")


_OPENERS: dict[str, Callable[[Path], AbstractContextManager[Any]]] = {
    "": lambda path: path.open("rb"),
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstd,
}


def _lines(file: TextFile, stream: BinaryIO, newline: str | None = None) -> Iterator[tuple[int, str]]:
    """Lines with their numbers; newline: as for `open`."""
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as decoded:
        for number, line in enumerate(decoded, 1):
            if found := _NOT_TEXT.search(line):
                kind = "a NUL byte, as binary files do" if found[0] == "\0" else "bytes that are no UTF-8"
                raise CalibrationError(f"{file}:{number} holds {kind}; give text in UTF-8")
            yield number, line


def _json_rows(file: TextFile, lines: Iterator[tuple[int, str]], column: str | None) -> Iterator[Row]:
    """Rows of JSON Lines or of one array, told apart by the first character."""
    begun = False
    for number, line in lines:
        where = f"{file}:{number}"
        if not line.strip():
            # White space before an array is no row.
            if begun:
                yield where, "text", ""
            continue
        if not begun and line.lstrip().startswith("["):
            rows = _parsed(line + "".join(line for _, line in lines), file, number)
            for index, row in enumerate(rows, 1):
                yield _json_row(row, f"{file} row {index}", column)
        else:
            yield _json_row(_parsed(line.strip(), file, number), where, column)
        begun = True


def _parsed(text: str, file: TextFile, first_line: int) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        reason, line = "nested too deeply", first_line
    except json.JSONDecodeError as error:
        reason, line = error.msg, first_line + error.lineno - 1
    except ValueError as error:  # an integer of thousands of digits
        reason, line = str(error), first_line
    raise CalibrationError(
        f"{file}:{line} is no JSON ({shown(reason)}); give an object a line, or one array of objects"
    )


def _json_row(row: Any, where: str, column: str | None) -> Row:
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise CalibrationError(f"{where}: expected a JSON object, not a value of type {type(row).__name__}")
    chosen = _column(row, column, where)
    return where, chosen, row[chosen]


def _separated_rows(file: TextFile, stream: BinaryIO, column: str | None) -> Iterator[Row]:
    """Rows of CSV or TSV with a header."""
    # The limit is the process's: its default refuses texts over 128 KiB.
    csv.field_size_limit(2**31 - 1)
    lines = (line for _, line in _lines(file, stream, newline=""))
    reader = csv.reader(lines, "excel" if file.format == CSV else "excel-tab", strict=True)
    begins = 1
    try:
        header = next(reader, [])
        chosen = _column(header, column, str(file))
        if header.count(chosen) > 1:
            raise CalibrationError(f"{file}:1 has more than one column {shown(chosen, 30)}: rename one")
        index, begins = header.index(chosen), reader.line_num + 1
        for row in reader:
            where = f"{file}:{begins}"
            if row and len(row) != len(header):
                raise CalibrationError(
                    f"{where} has {len(row)} fields and the header {len(header)}: put texts that hold the separator "
                    "or a line break in double quotes"
                )
            yield where, chosen, row[index] if row else ""
            begins = reader.line_num + 1
    except csv.Error as error:
        raise CalibrationError(
            f"{file}:{begins} is no {file.format} ({shown(error)}): close its quotes, and double those inside a text"
        ) from None


def _parquet_rows(file: TextFile, column: str | None) -> Iterator[Row]:
    with pq.ParquetFile(file.path) as parquet:
        chosen, number = _column(parquet.schema_arrow.names, column, str(file)), 0
        for batch in parquet.iter_batches(_PARQUET_BATCH, columns=[chosen]):
            for value in batch.column(chosen):
                number += 1
                where = f"{file} row {number}"
                try:
                    yield where, chosen, value.as_py()
                except UnicodeDecodeError:
                    raise CalibrationError(f"{where} holds bytes that are no UTF-8; give text in UTF-8") from None
