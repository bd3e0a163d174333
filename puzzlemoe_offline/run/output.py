"""Writing a model folder shard by shard, so that a killed run resumes and a half-written one never loads as a model.

Shards appear by atomic rename; config.json and the index, without which nothing loads the folder, come last.  The index
says which run wrote the folder, so that resuming a finished one is no error.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum, auto
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.filesize import decimal
from safetensors.torch import load_file
from torch import Tensor

from puzzlemoe_offline.methods.base import LayerRecord
from puzzlemoe_offline.model.hub import small_files
from puzzlemoe_offline.run.files import OutputError, StateRecord, is_intact, put, sync, write_file, writing
from puzzlemoe_offline.run.report import REPORT
from puzzlemoe_offline.run.work import FinishedShard, WorkFolder
from puzzlemoe_vllm.format.files import file_digest, read_json_object
from puzzlemoe_vllm.format.layout import LayoutError, parse_config
from puzzlemoe_vllm.format.packed_folder import check_headers
from puzzlemoe_vllm.format.shards import INDEX, ShardRecord, index_with_records, record_shard, save_shard

CONFIG = "config.json"

STATE_SECONDS = 30
"""Work of which a killed run may have kept no hidden states, and which it does again.  A GPU may be done with a layer
sooner than its states are written."""

SMALL_STATES = 1 << 26
"""Bytes of hidden states that are kept after every layer."""

BEHIND = 2
"""Shards that are written and read for their digest while the caller makes others.  One thread is slower at Mixtral's
0.7 GB than two GPUs are at a layer."""

_Content = tuple[dict[str, Tensor], dict[str, str]]
"""Tensors and metadata of a file."""

Record = TypeVar("Record", ShardRecord, StateRecord)


class _Holds(Enum):
    """What an output folder holds."""

    nothing = auto()
    unfinished = auto()
    finished = auto()
    other = auto()


class _Finished(BaseModel):
    """`metadata` of the index of a finished folder.  run_sha256: the fingerprint of the run that wrote it;
    layout_sha256: in a packed folder."""

    model_config = ConfigDict(extra="ignore")

    run_sha256: str
    shards: dict[str, ShardRecord]
    layout_sha256: str | None = None


class ModelFolder:
    """An output folder in the making: `shards` numbered safetensors files with that metadata.  Every method raises
    OutputError when the folder cannot be written."""

    def __init__(self, folder: Path, shards: int, metadata: dict[str, str]):
        self.folder, self.shards, self.metadata = folder, shards, metadata
        self.work = WorkFolder(folder)
        self._fingerprint = ""
        self._mode = 0o666 & ~_umask()
        self._behind: ThreadPoolExecutor | None = None
        self._outstanding: deque[Future[None]] = deque()
        self._state_kept = 0.0  # `time.monotonic()`

    def check(self, resume: bool, needed: int) -> None:
        """Raises OutputError when the folder holds something else, an unfinished run that is not to be resumed, or
        links, or when its disk has no room for what is not written yet of `needed` bytes."""
        match self._holds():
            case _Holds.unfinished if not resume:
                raise OutputError(
                    f"{self.folder} holds an unfinished run: go on with --resume, name a new folder or empty this one"
                )
            case _Holds.finished if resume:
                self._check_links()
                return
            case _Holds.finished | _Holds.other:
                raise OutputError(f"{self.folder} is not empty: name a new folder or empty this one")
        self._check_links()
        self._check_space(needed)

    def _holds(self) -> _Holds:
        with writing(self.folder):
            if self._finished() is not None:
                return _Holds.finished
            if self.work.begun:
                return _Holds.unfinished
            others = self.folder.exists() and any(path != self.work.path for path in self.folder.iterdir())
            return _Holds.other if others else _Holds.nothing

    def _finished(self) -> _Finished | None:
        """What the index says of a finished folder; None of one that no run has finished."""
        if not (self.folder / CONFIG).exists():
            return None
        try:
            return _Finished.model_validate(read_json_object(self.folder / INDEX).get("metadata"))
        except (LayoutError, ValidationError):
            return None

    def _check_links(self) -> None:
        """A run makes no links: one that is there would have what lies elsewhere read, or overwritten."""
        for parent, folders, files in os.walk(self.folder):
            for name in (*folders, *files):
                if (path := Path(parent, name)).is_symlink():
                    raise OutputError(f"{path} is a link, which no run makes: remove it, or name a new folder")

    def _check_space(self, needed: int) -> None:
        path = self.folder.absolute()
        free = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
        if self.work.begun:
            written = [shard for shard in self._shard_paths() if shard.is_file()]
            needed -= sum(shard.stat().st_size for shard in written) + self.work.bytes
        if needed > free:
            raise OutputError(
                f"{self.folder}: the run writes up to {decimal(needed)}, and its disk has {decimal(free)} left: make "
                "room or name a folder elsewhere"
            )

    @contextmanager
    def opened(self, fingerprint: str, resume: bool, needed: int) -> Iterator[list[LayerRecord | None] | None]:
        """The folder of a run, which no other can write meanwhile: the records of the shards that an earlier run
        finished, in order; None when it finished all, and they are as it wrote them.

        Raises OutputError as `check` does, for another run's folder, and for a finished one that was changed.
        """
        self.check(resume, needed)
        if self._holds() is _Holds.finished and not self.work.path.exists():
            self._check_finished(fingerprint)
            yield None
            return
        with self.work.locked():
            # Again: another run may have ended meanwhile.
            self.check(resume, needed)
            if self._holds() is _Holds.finished:
                self._check_finished(fingerprint)
                with writing(self.folder):
                    self.work.remove()
                yield None
                return
            self._fingerprint = fingerprint
            finished = self._go_on(fingerprint)
            self._state_kept = time.monotonic()
            with ThreadPoolExecutor(BEHIND) as self._behind:
                yield [shard.layer for shard in finished]

    def _go_on(self, fingerprint: str) -> list[FinishedShard]:
        with writing(self.folder):
            if not self.work.begun:
                self.work.begin(fingerprint)
                return []
            self._check_same_run(self.work.fingerprint(), fingerprint, "an unfinished run")
            return self.work.finished(self._shard_paths())

    def _check_same_run(self, held: str, fingerprint: str, what: str) -> None:
        if held != fingerprint:
            raise OutputError(
                f"{self.folder} holds {what} of another source, recipe or calibration, or on another device "
                "or by another version of this tool: repeat that run's options, or name a new folder"
            )

    def _check_finished(self, fingerprint: str) -> None:
        """Raises OutputError or LayoutError unless this run finished the folder, and its weights and config.json are
        still what it wrote."""
        found = self._finished()
        assert found
        self._check_same_run(found.run_sha256, fingerprint, "a finished model")
        with ThreadPoolExecutor() as pool:
            intact = pool.map(lambda item: is_intact(self.folder / item[0], item[1]), found.shards.items())
            for name, whole in zip(found.shards, intact, strict=True):
                if not whole:
                    raise OutputError(
                        f"{self.folder / name} is not as this run wrote it: empty {self.folder} and run again, or name "
                        "a new folder"
                    )
        packed = read_json_object(self.folder / CONFIG).get("quantization_config")
        if found.layout_sha256 and not packed:
            raise OutputError(
                f"{self.folder / CONFIG} has no quantization_config, this run wrote one: empty {self.folder} and run "
                "again, or name a new folder"
            )
        if packed:
            check_headers(self.folder, parse_config(packed))

    def shard_name(self, number: int) -> str:
        """File name of shard `number`, counted from 0."""
        return f"model-{number + 1:05d}-of-{self.shards:05d}.safetensors"

    def _shard_paths(self) -> list[Path]:
        return [self.folder / self.shard_name(number) for number in range(self.shards)]

    def write_shard(
        self,
        number: int,
        tensors: dict[str, Tensor],
        state: Tensor | None,
        record: LayerRecord | None,
        behind: bool = False,
    ) -> None:
        """Writes a shard and, if it is time for that, the hidden states that the next one needs (`state`).

        It is synced, read for its digest and recorded, and only then finished, while the caller makes the next ones;
        an error in that is raised by a later call.  behind: so is it written, and the caller leaves tensors and state
        as they are.  The record gets the seconds that this call took.
        """
        began = time.perf_counter()
        self._wait_until_outstanding(BEHIND - 1)
        files = {self._partial(self.shard_name(number)): (to_host(tensors), self.metadata)}
        if has_state := state is not None and self._is_time_for(state):
            files[self._partial(self.work.state(number).name)] = {"state": state}, {"format": "pt"}
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
        if not behind:
            for partial, content in files.items():
                self._save(*content, partial)
        if record:
            record.seconds["write"] = time.perf_counter() - began
        assert self._behind, "the folder is not open"
        finishing = self._behind.submit(
            self._finish_shard,
            number,
            sizes,
            record,
            files if behind else {},
            self._outstanding[-1] if self._outstanding else None,
            state_needed=state is not None,
            has_state=has_state,
        )
        self._outstanding.append(finishing)

    def _is_time_for(self, state: Tensor) -> bool:
        """Whether hidden states are to be kept; if so, the time runs anew."""
        now = time.monotonic()
        if state.nbytes > SMALL_STATES and now - self._state_kept < STATE_SECONDS:
            return False
        self._state_kept = now
        return True

    def _partial(self, name: str) -> Path:
        return self.work.path / f"{name}.partial"

    def _save(self, tensors: dict[str, Tensor], metadata: dict[str, str], partial: Path) -> None:
        with writing(self.folder):
            partial.unlink(missing_ok=True)
            save_shard(tensors, partial, metadata)
            partial.chmod(self._mode)

    def _finish_shard(
        self,
        number: int,
        sizes: dict[str, int],
        record: LayerRecord | None,
        files: dict[Path, _Content],
        before: Future[None] | None,
        *,
        state_needed: bool,
        has_state: bool,
    ) -> None:
        """Finishes the shard that lies in the partial files, or in `files` that are to be written there, after the one
        `before` it.

        state_needed: whether the next shard needs hidden states.  has_state: whether they are kept after this one.
        """
        partial_shard = self._partial(self.shard_name(number))
        partial_state = self._partial(self.work.state(number).name)

        def recorded(partial: Path, recorder: Callable[[Path], Record]) -> Record:
            if content := files.get(partial):
                self._save(*content, partial)
            with writing(self.folder):
                return recorder(partial)

        with ThreadPoolExecutor(1) as beside:
            waiting = beside.submit(recorded, partial_state, StateRecord.of) if has_state else None
            digests = recorded(partial_shard, record_shard)
            state = waiting.result() if waiting else None
        if before:
            before.result()
        with writing(self.folder):
            put(partial_shard, self.folder / self.shard_name(number))
            if has_state:
                put(partial_state, self.work.state(number))
            finished = FinishedShard(
                tensors=sizes, digests=digests, state_needed=state_needed, state=state, layer=record
            )
            self.work.write_json(self.work.record(number), finished)
            if has_state:
                self.work.drop_states_before(number)

    def wait(self) -> None:
        """Returns when the shards before are finished.  Raises what writing them behind raised."""
        self._wait_until_outstanding(0)

    def _wait_until_outstanding(self, most: int) -> None:
        """Returns when no more shards than that are being finished; raises what one of the others raised."""
        while self._outstanding and (self._outstanding[0].done() or len(self._outstanding) > most):
            self._outstanding.popleft().result()

    def state_after(self, number: int) -> Tensor:
        """The `state` that was written with shard `number`."""
        return load_file(self.work.state(number))["state"]

    def finish(self, config: dict[str, Any], source: Path, files: dict[str, str]) -> None:
        """Copies the source's small files, writes `files`, then index and config.json, and drops the work folder."""
        self.wait()
        with writing(self.folder):
            for path in small_files(source):
                if path.name not in files:
                    target = self.folder / path.relative_to(source)
                    target.parent.mkdir(exist_ok=True)
                    self._write(target, path.read_bytes())
            for name, text in files.items():
                self._write(self.folder / name, text.encode())
            digests = self._file_digests(source, files) | {CONFIG: hashlib.sha256(_json(config)).hexdigest()}
            self._write(self.folder / INDEX, _json(self._index(config, digests)))
            self._write(self.folder / CONFIG, _json(config))
            self.work.remove()
            sync(self.folder)

    def _file_digests(self, source: Path, files: dict[str, str]) -> dict[str, str]:
        """SHA-256 of the files beside the shards, by name, but for the report, which has times in it."""
        copied = {path.relative_to(source).as_posix() for path in small_files(source)}
        names = sorted((copied | files.keys()) - {REPORT})
        return {name: file_digest(self.folder / name, self.folder) for name in names}

    def _write(self, target: Path, data: bytes) -> None:
        write_file(target, data, self.work.partial)

    def _index(self, config: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
        """The index of the finished shards, with the run that wrote them and the digests of other files."""
        weight_map: dict[str, str] = {}
        records: dict[str, ShardRecord] = {}
        total = 0
        for number in range(self.shards):
            name = self.shard_name(number)
            finished = FinishedShard.model_validate_json(self.work.record(number).read_text())
            weight_map |= dict.fromkeys(finished.tensors, name)
            records[name] = finished.digests
            total += sum(finished.tensors.values())
        packed = config.get("quantization_config")
        layout = parse_config(packed) if packed else None
        index = index_with_records(self.folder, weight_map, total, layout, records)
        index["metadata"] |= {"files": files, "run_sha256": self._fingerprint}
        return index


def to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous, on the CPU.

    From a GPU they go to pinned memory, which is what `non_blocking` takes and torch keeps for the next time: fresh
    memory of the usual kind costs more, a fault for each of its pages, than the copy itself.
    """
    on_host = {name: tensor.contiguous().to("cpu", non_blocking=True) for name, tensor in tensors.items()}
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return on_host


def _umask() -> int:
    """The process's file mode mask, which safetensors does not apply; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
