"""A folder that this project writes: shards, their index, and the digests in it by which damage to either is found."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from puzzlemoe_vllm.format.files import check_file_name, fault, file_digest, open_regular, read_json_object
from puzzlemoe_vllm.format.headers import read_header
from puzzlemoe_vllm.format.layout import FORMAT_VERSION, PuzzleConfig, layout_digest

INDEX = "model.safetensors.index.json"

CARD = "README.md"

VERSION_KEY, CODE_KEY = "puzzlemoe_format_version", "puzzlemoe_code"
"""Keys of a packed shard's safetensors metadata."""


class ShardRecord(BaseModel):
    """What the index keeps of a shard: SHA-256 of the whole file and of its header's JSON text, and its size."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    header_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class _Records(BaseModel):
    """`metadata` of the index of a folder that this project wrote.  files: SHA-256 of the files beside the shards."""

    model_config = ConfigDict(extra="ignore")

    shards: dict[str, ShardRecord]
    files: dict[str, str] = {}


class PackedMetadata(_Records):
    """The same of a packed folder."""

    layout_sha256: str


def _weight_map(path: Path, index: dict[str, Any]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise fault(path, "has no weight_map of file names: copy or download it again")
    for name in weight_map.values():
        if not isinstance(name, str):
            check_file_name(path, name)
    for name in set(weight_map.values()):
        check_file_name(path, name)
    return weight_map


def read_weight_map(folder: Path) -> dict[str, str]:
    """File name by tensor name, from a folder's index; the files need not be there.  Raises LayoutError."""
    path = folder / INDEX
    return _weight_map(path, read_json_object(path))


def read_index(folder: Path) -> dict[str, str]:
    """File name by tensor name, from a folder's index.  Every file is a regular file of the folder, or LayoutError says
    which is not."""
    weight_map = read_weight_map(folder)
    for name in sorted(set(weight_map.values())):
        open_regular(folder / name).close()
    return weight_map


def shard_metadata(code: str | None) -> dict[str, str]:
    """safetensors metadata of a packed model's shards; code: of its pair words, None when nothing merged in pairs."""
    metadata = {"format": "pt", VERSION_KEY: str(FORMAT_VERSION)}
    return metadata | ({CODE_KEY: code} if code else {})


def save_shard(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file, equal bytes for equal tensors and metadata: safetensors itself puts the metadata in a
    new order each time.  Raises OSError or SafetensorError as it does."""
    save_file(tensors, path, metadata=metadata)
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        fields = json.loads(file.read(length))
        fields["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "safetensors writes JSON without spaces"
        file.seek(8)
        file.write(text.ljust(length))


def record_shard(path: Path) -> ShardRecord:
    """The record of a finished shard; reads the whole file."""
    header = read_header(path)
    return ShardRecord(sha256=file_digest(path), header_sha256=header.sha256, bytes=path.stat().st_size)


def index_with_records(
    folder: Path,
    weight_map: dict[str, str],
    total_size: int,
    config: PuzzleConfig | None,
    records: dict[str, ShardRecord] | None = None,
) -> dict[str, Any]:
    """The index of a finished folder, as JSON data: `INDEX` holds it.

    weight_map: file name by tensor name; total_size: bytes of all tensors; config: of a packed model, None for a dense
    one; records: of the shards, by file name.  A shard without a record is read.
    """
    records = records or {}
    shards = {name: records.get(name) or record_shard(folder / name) for name in sorted(set(weight_map.values()))}
    metadata: dict[str, Any] = {"total_size": total_size}
    if config is not None:
        metadata["layout_sha256"] = layout_digest(config)
    metadata["shards"] = {name: record.model_dump() for name, record in shards.items()}
    return {"metadata": metadata, "weight_map": weight_map}


Metadata = TypeVar("Metadata", bound=_Records)


def index_of(folder: Path, kind: type[Metadata]) -> tuple[dict[str, str], Metadata]:
    """The index of a folder that this project wrote: file names by tensor name, and the records of those files."""
    path = folder / INDEX
    index = read_json_object(path)
    weight_map = _weight_map(path, index)
    try:
        metadata = kind.model_validate(index.get("metadata"))
    except ValidationError:
        raise fault(
            path, "has no digests of the shards: it is not this model's own; copy it again or compress the source again"
        ) from None
    if metadata.shards.keys() != set(weight_map.values()):
        raise fault(path, "its digests are of other files than it names: copy or download it again")
    return weight_map, metadata


def has_digests(folder: Path) -> bool:
    """Whether a folder's index has digests of its shards.  Raises LayoutError for an index that cannot be read."""
    if not os.path.lexists(folder / INDEX):
        return False
    metadata = read_json_object(folder / INDEX).get("metadata")
    return isinstance(metadata, dict) and "shards" in metadata


def changed_files(folder: Path) -> list[str]:
    """Names of files beside the shards that are not as they were written: edited, or gone.  A card that is gone is none
    of them, since the hub's are not fetched with a model.

    Raises LayoutError for an index that cannot be read, and for a file that is none of the folder's own.
    """
    if not has_digests(folder):
        return []
    files = index_of(folder, _Records)[1].files
    for name in files:
        for part in name.split("/"):
            check_file_name(folder / INDEX, part)
    there = {name: os.path.lexists(folder / name) for name in files if name != CARD or os.path.lexists(folder / name)}
    return [name for name in sorted(there) if not there[name] or file_digest(folder / name, folder) != files[name]]


def check_digests(folder: Path, workers: int | None = None) -> None:
    """Every byte of every shard is as it was written.  Reads all of them, `workers` at a time (one a core).

    Raises LayoutError naming the first file that is damaged.
    """
    _, metadata = index_of(folder, _Records)

    def check(item: tuple[str, ShardRecord]) -> None:
        name, record = item
        if file_digest(folder / name) != record.sha256:
            raise fault(folder / name, "is damaged, its SHA-256 is not the index's: copy or download it again")

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for _ in pool.map(check, sorted(metadata.shards.items())):
            pass
