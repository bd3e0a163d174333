"""The hidden folder of an unfinished run: its lock, what it is a run of, and from where it can go on."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ValidationError

from puzzlemoe_offline.methods.base import LayerRecord
from puzzlemoe_offline.run.files import OutputError, StateRecord, is_intact, write_file, writing
from puzzlemoe_vllm.format.files import read_json_object
from puzzlemoe_vllm.format.layout import LayoutError
from puzzlemoe_vllm.format.shards import ShardRecord

logger = logging.getLogger(__name__)

WORK = ".puzzlemoe-work"


class FinishedShard(BaseModel):
    """What is kept of a finished shard: its tensors' bytes, its digests, and what is known of its layer.

    state_needed: whether the next layer needs the hidden states after it.  state: digests of them, if they were kept.
    """

    tensors: dict[str, int]
    digests: ShardRecord
    state_needed: bool
    state: StateRecord | None = None
    layer: LayerRecord | None = None


class _Run(BaseModel):
    """run.json."""

    fingerprint: str


class WorkFolder:
    """The work folder of an output folder.  Nothing in it is trusted when a run goes on."""

    def __init__(self, out: Path):
        self.out, self.path = out, out / WORK
        self.run, self.lock, self.partial = (self.path / name for name in ("run.json", "lock", "partial"))

    def record(self, number: int) -> Path:
        """The record of shard `number`; a shard without one is not finished."""
        return self.path / f"shard-{number:05d}.json"

    def state(self, number: int) -> Path:
        """The hidden states after shard `number`."""
        return self.path / f"state-{number:05d}.safetensors"

    @property
    def begun(self) -> bool:
        """Whether a run has begun here and has not ended; a folder without run.json was made by one that did not
        come to begin."""
        return os.path.lexists(self.run)

    @property
    def bytes(self) -> int:
        """What its files take on the disk."""
        return sum(file.lstat().st_size for file in self.path.iterdir())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder and holds it against other runs.  The kernel lets go of it when the process ends, however it
        ends.  Raises OutputError when another run holds it."""
        with writing(self.out):
            descriptor = self._lock()
        try:
            yield
        finally:
            os.close(descriptor)

    def _lock(self) -> int:
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A run that ended just now has removed the file that was opened here: then there is another, or none.
                if self.lock.exists() and os.path.samestat(os.fstat(descriptor), self.lock.stat()):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                raise OutputError(
                    f"{self.out}: another run is writing it: wait for that to end, or name another folder"
                ) from None
            os.close(descriptor)

    def begin(self, fingerprint: str) -> None:
        """Begins a run, in place of what another left that did not come to begin."""
        self.clear()
        self.write_json(self.run, _Run(fingerprint=fingerprint))

    def fingerprint(self) -> str:
        """Of the run that has begun.  Raises OutputError when run.json is damaged."""
        try:
            return _Run.model_validate(read_json_object(self.run)).fingerprint
        except (LayoutError, ValidationError):
            raise OutputError(
                f"{self.run} is damaged, and with it is lost what run {self.out} holds: empty this folder, or name a "
                "new one"
            ) from None

    def finished(self, shards: list[Path]) -> list[FinishedShard]:
        """The finished shards after which the run can go on; all that is not of them is removed.

        shards: all files that the run writes, in order.  Those of which an earlier run finished are read whole.  A line
        on stderr says so when one of them, or the hidden states that were kept last, are no longer as they were
        written.  Layers that need hidden states go on after those that were kept last, or else start again from the
        first.
        """
        recorded = sum(os.path.lexists(self.record(number)) for number in range(len(shards)))
        usable: list[FinishedShard] = []
        with ThreadPoolExecutor() as pool:
            for shard in pool.map(self._intact_shard, range(recorded), shards):
                if shard is None:
                    break
                usable.append(shard)
        count = len(usable)
        lost = "" if count == recorded else f"{shards[count].name}, or what is kept of it,"
        while usable and usable[-1].state_needed:
            kept_last = self.state(len(usable) - 1)
            if state := usable[-1].state:
                if is_intact(kept_last, state):
                    break
                lost = lost or kept_last.name
            usable.pop()
        if lost:
            logger.warning(
                "%s: %s is not as the unfinished run wrote it: going on from layer %d", self.out, lost, len(usable)
            )
        kept = {self.record(number) for number in range(len(usable))} | {self.state(len(usable) - 1)}
        self.clear(kept | {self.run})
        for shard_path in shards[len(usable) :]:  # a disk may have no room for a second one beside it
            shard_path.unlink(missing_ok=True)
        return usable

    def _intact_shard(self, number: int, shard: Path) -> FinishedShard | None:
        try:
            finished = FinishedShard.model_validate(read_json_object(self.record(number)))
        except (LayoutError, ValidationError):
            return None
        return finished if is_intact(shard, finished.digests) else None

    def drop_states_before(self, number: int) -> None:
        """Removes the hidden states after earlier shards."""
        for path in self.path.glob("state-*"):
            if path.name < self.state(number).name:
                path.unlink()

    def clear(self, kept: set[Path] | None = None) -> None:
        """Removes what earlier runs left but for the lock and the files `kept`."""
        for path in self.path.iterdir():
            if path in (kept or set()) or path == self.lock:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def remove(self) -> None:
        """Removes the folder.  What is left when that is cut short is removed by the next run."""
        shutil.rmtree(self.path)

    def write_json(self, path: Path, data: BaseModel) -> None:
        """Writes one of the folder's files; fields that are None are left out."""
        text = json.dumps(data.model_dump(exclude_none=True), indent=2, ensure_ascii=False) + "\n"
        write_file(path, text.encode(), self.partial)
