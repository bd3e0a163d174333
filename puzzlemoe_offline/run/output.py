"""Writing a model folder shard by shard, so that a killed run resumes and a half-written one never loads as a model.

Shards appear by atomic rename; config.json and the index, without which nothing loads the folder, come last.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from puzzlemoe_offline.methods.base import LayerRecord
from puzzlemoe_offline.model.hub import SMALL_FILES
from puzzlemoe_vllm.errors import UserError
from puzzlemoe_vllm.format.layout import parse_config
from puzzlemoe_vllm.format.shards import INDEX, ShardRecord, index_with_records, record_shard, save_shard

WORK = ".puzzlemoe-work"


class OutputError(UserError):
    """An output folder that cannot be used; the text says what to do."""


class FinishedShard(BaseModel):
    """What is kept of a finished shard: its tensors' bytes, its digests, and what is known of its layer."""

    tensors: dict[str, int]
    digests: ShardRecord
    layer: LayerRecord | None = None


def check_space(folder: Path, needed: int) -> None:
    """Raises OutputError when a folder that is to hold `needed` bytes, with what it holds already, has no room."""
    path = folder.absolute()
    free = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
    held = sum(file.stat().st_size for file in path.glob("*") if file.is_file())
    if needed > free + held:
        raise OutputError(
            f"{folder}: the run writes up to {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB left: make "
            "room or name a folder elsewhere"
        )


class ModelFolder:
    """An output folder in the making: `shards` numbered safetensors files with that metadata.  Every method raises
    OutputError when the folder cannot be written."""

    def __init__(self, folder: Path, shards: int, metadata: dict[str, str]):
        self.folder, self.shards, self.metadata = folder, shards, metadata
        self.work = folder / WORK
        self.run = self.work / "run.json"

    def check(self, resume: bool) -> None:
        """Raises OutputError when the folder holds something else, or an unfinished run that is not to be resumed."""
        if self.run.exists() and not resume:
            raise OutputError(
                f"{self.folder} holds an unfinished run: go on with --resume, name a new folder or empty this one"
            )
        with self._writing():
            used = not self.run.exists() and self.folder.exists() and any(self.folder.iterdir())
        if used:
            raise OutputError(f"{self.folder} is not empty: name a new folder or empty this one")

    def start(self, fingerprint: str, resume: bool) -> list[LayerRecord | None]:
        """Prepares the folder and returns the records of the shards that an earlier run finished, in order.

        Raises OutputError as `check` does, and for an unfinished run of another fingerprint.
        """
        self.check(resume)
        if not self.run.exists():
            with self._writing():
                self.work.mkdir(parents=True, exist_ok=True)
                _write_json(self.run, {"fingerprint": fingerprint})
            return []
        if json.loads(self.run.read_text())["fingerprint"] != fingerprint:
            raise OutputError(
                f"{self.folder} holds an unfinished run of another source, recipe or calibration, or on another device "
                "or by another version of this tool: repeat that run's options, or name a new folder"
            )
        records: list[LayerRecord | None] = []
        while self._record(len(records)).exists():
            records.append(self._read_record(len(records)).layer)
        return records

    def shard_name(self, number: int) -> str:
        """File name of shard `number`, counted from 0."""
        return f"model-{number + 1:05d}-of-{self.shards:05d}.safetensors"

    def write_shard(
        self, number: int, tensors: dict[str, Tensor], state: Tensor | None, record: LayerRecord | None
    ) -> None:
        """Writes a shard, what the next shard needs to go on (`state`), and its record: only then is it finished.

        The record gets the seconds that the shard took.
        """
        began = time.perf_counter()
        target = self.folder / self.shard_name(number)
        partial = self.work / target.name
        on_host = to_host(tensors)
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
        with self._writing():
            save_shard(on_host, partial, self.metadata)
            partial.chmod(0o666 & ~_umask())
            digests = record_shard(partial)
            os.replace(partial, target)
            if state is not None:
                save_file({"state": state}, self._state(number))
            if record:
                record.seconds["write"] = time.perf_counter() - began
            finished = FinishedShard(tensors=sizes, digests=digests, layer=record)
            _write_json(self._record(number), finished.model_dump(exclude_none=True))
            self._state(number - 1).unlink(missing_ok=True)

    def state_after(self, number: int) -> Tensor:
        """The `state` that was written with shard `number`."""
        return load_file(self._state(number))["state"]

    def finish(self, config: dict[str, Any], source: Path, files: dict[str, str]) -> None:
        """Copies the source's small files, writes `files`, then index and config.json, and drops the work folder."""
        with self._writing():
            for pattern in SMALL_FILES:
                for path in source.glob(pattern):
                    if path.is_file() and path.name not in ("config.json", INDEX, *files):
                        target = self.folder / path.relative_to(source)
                        target.parent.mkdir(exist_ok=True)
                        shutil.copyfile(path, target)
            for name, text in files.items():
                (self.folder / name).write_text(text, encoding="utf-8")
            weight_map: dict[str, str] = {}
            records: dict[str, ShardRecord] = {}
            total = 0
            for number in range(self.shards):
                finished, name = self._read_record(number), self.shard_name(number)
                weight_map |= dict.fromkeys(finished.tensors, name)
                records[name] = finished.digests
                total += sum(finished.tensors.values())
            packed = config.get("quantization_config")
            layout = parse_config(packed) if packed else None
            _write_json(self.folder / INDEX, index_with_records(self.folder, weight_map, total, layout, records))
            _write_json(self.folder / "config.json", config)
            shutil.rmtree(self.work)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{self.folder} cannot be written ({error}): make room or name another folder; "
                "--resume goes on after the last whole layer"
            ) from None

    def _record(self, number: int) -> Path:
        return self.work / f"shard-{number:05d}.json"

    def _read_record(self, number: int) -> FinishedShard:
        return FinishedShard.model_validate_json(self._record(number).read_text())

    def _state(self, number: int) -> Path:
        return self.work / f"state-{number:05d}.safetensors"


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


def _write_json(path: Path, data: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
