"""Files that a crash leaves whole or absent: written under another name, synced, then renamed; never through a link."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel
from safetensors import SafetensorError

from puzzlemoe_vllm.errors import UserError
from puzzlemoe_vllm.format.files import file_digest
from puzzlemoe_vllm.format.layout import LayoutError
from puzzlemoe_vllm.format.shards import ShardRecord

STATE_BLOCK = 1 << 25
"""Bytes of a file of hidden states that one thread reads at a time."""


class OutputError(UserError):
    """An output folder that cannot be used; the text says what to do."""


class WriteError(OutputError):
    """An output folder that could not be written; what a run had finished in it stays."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what the system refuses into a WriteError that names the output folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WriteError(f"{folder} cannot be written ({error}): make room or name another folder") from None


def sync(path: Path) -> None:
    """Returns when the disk holds a file's content, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync no folders: they hold an entry once it is made.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def put(partial: Path, target: Path) -> None:
    """Gives a finished file its name, in place of whatever file or link has it; both lie on one disk."""
    sync(partial)
    os.replace(partial, target)
    sync(target.parent)


def write_file(target: Path, data: bytes, partial: Path) -> None:
    """Writes a file by way of `partial`, which must lie on the same disk."""
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    with open(descriptor, "wb") as file:
        file.write(data)
    put(partial, target)


class StateRecord(BaseModel):
    """What is kept of a file of hidden states: its bytes, and the SHA-256 of the digests of its blocks, which threads
    read side by side: one would take longer over the states than a GPU takes over a layer."""

    bytes: int
    blocks_sha256: str

    @classmethod
    def of(cls, path: Path) -> StateRecord:
        """Reads the whole file."""
        size = path.stat().st_size

        def digest(start: int) -> bytes:
            with path.open("rb") as file:
                file.seek(start)
                return hashlib.sha256(file.read(STATE_BLOCK)).digest()

        with ThreadPoolExecutor(4) as pool:
            blocks = b"".join(pool.map(digest, range(0, size, STATE_BLOCK)))
        return cls(bytes=size, blocks_sha256=hashlib.sha256(blocks).hexdigest())


def is_intact(path: Path, record: ShardRecord | StateRecord) -> bool:
    """Whether a file is, byte for byte, the one that was recorded; reads all of it."""
    try:
        if path.stat().st_size != record.bytes:
            return False
        if isinstance(record, StateRecord):
            return StateRecord.of(path) == record
        return file_digest(path) == record.sha256
    except (LayoutError, OSError):
        return False
