"""A model folder's files.  Names and JSON are not trusted: what a message repeats of them is cut, and nothing but the
folder's own regular files is opened."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from puzzlemoe_vllm.errors import shown
from puzzlemoe_vllm.format.layout import LayoutError

LARGEST_INDEX = 500_000_000
"""Bytes: some millions of tensors."""

BLOCK = 4 << 20
"""Bytes read at a time for a digest."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def fault(path: Path, text: str) -> LayoutError:
    """The error that names a file."""
    return LayoutError(f"{shown(path, 200)}: {text}")


def open_regular(path: Path, folder: Path | None = None) -> BinaryIO:
    """A file of a model folder (`folder`, or the one that it lies in), opened for reading.  A link may lead to a file
    of the folder itself or, in a snapshot of the Hugging Face cache, to its blob.

    Raises LayoutError for a missing file, anything that is no regular file (which is not opened), or a link elsewhere.
    """
    try:
        root, target = (folder or path.parent).resolve(), path.resolve()
        in_cache = root.parent.name == "snapshots" and target.parent == (root.parent.parent / "blobs").resolve()
        if not target.is_relative_to(root) and not in_cache:
            raise fault(path, "is a link to a file outside the model folder: put the file itself there")
        if not stat.S_ISREG(path.stat().st_mode):
            raise fault(path, "is not a regular file: copy or download it again")
        return path.open("rb")
    except FileNotFoundError:
        raise fault(path, "is missing: the download or the copy is incomplete") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links, in Python before 3.13
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise fault(path, f"cannot be read ({shown(reason)})") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{shown(name)} stands in it twice")
    return fields


def parse_json_object(path: Path, text: bytes, what: str = "") -> dict[str, Any]:
    """The object that the text of a file is.  Raises LayoutError when it is none, nested too deeply, or names a field
    twice."""
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise fault(path, f"{what}JSON is nested too deeply: copy or download the file again") from None
    except ValueError as error:
        raise fault(path, f"{what}is not valid JSON ({shown(error)}): copy or download the file again") from None
    if not isinstance(data, dict):
        raise fault(path, f"{what}is not a JSON object: copy or download the file again")
    if _SURROGATE.search(text):
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise fault(path, f"{what}holds half a character, which no file can: copy or download it again") from None
    return data


def read_json_object(path: Path, largest: int = LARGEST_INDEX) -> dict[str, Any]:
    """A JSON file of a model folder.

    Raises LayoutError as `open_regular` and `parse_json_object` do, and for a file of more than `largest` bytes.
    """
    with open_regular(path) as file:
        text = file.read(largest + 1)
    if len(text) > largest:
        raise fault(path, f"has more than {largest} bytes: it is not what its name says")
    return parse_json_object(path, text)


def check_file_name(index: Path, name: object) -> None:
    """Raises LayoutError unless an index may name such a file: a plain name, of a file inside the folder."""
    plain = (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(letter in name for letter in "/\\\0")
        and len(name.encode("utf-8", "surrogatepass")) <= 255
    )
    if not plain:
        raise fault(index, f"names {shown(repr(name))}, which is no plain file name inside the folder: copy it again")


def file_digest(path: Path, folder: Path | None = None) -> str:
    """SHA-256 of a whole file, read in blocks.  folder: as in `open_regular`, which says what it raises, too."""
    digest = hashlib.sha256()
    with open_regular(path, folder) as file:
        try:
            while block := file.read(BLOCK):
                digest.update(block)
        except OSError as error:
            raise fault(path, f"cannot be read ({shown(error.strerror)})") from None
    return digest.hexdigest()
