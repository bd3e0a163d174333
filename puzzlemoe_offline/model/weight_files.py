"""Which safetensors files make up a model, and which of them holds a tensor; from names and headers alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from puzzlemoe_offline.model.other_formats import no_weights_reason
from puzzlemoe_vllm.errors import UserError, shown
from puzzlemoe_vllm.format.headers import ShardHeader, read_header
from puzzlemoe_vllm.format.shards import INDEX, read_index

WHOLE = "model.safetensors"
"""The file of a model that is not split: other files beside it are not the model's."""

FOREIGN = ("consolidated", "adapter_model")
"""What file names begin with that hold other weights than the model's, or the same under other names."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read; the text names the file or tensor and the way out."""


def read_headers(folder: Path) -> dict[str, ShardHeader]:
    """Headers, by file name, of the files that make up a dense model.

    With an index these are the files that it names, and each tensor is in the file that it says and in no other.
    Without one it is model.safetensors or else all safetensors files but foreign ones, with no tensor twice.
    Raises UserError: one line that names the file or tensor.
    """
    weight_map = read_index(folder) if os.path.lexists(folder / INDEX) else None
    files = sorted(set(weight_map.values())) if weight_map else files_without_index(folder, os.listdir(folder))
    headers = {file: read_header(folder / file) for file in files}
    check_places(folder, headers, weight_map)
    return headers


def files_without_index(folder: Path, names: Iterable[str]) -> list[str]:
    """Of the names of all files, those that make up a model without an index.

    Raises CheckpointError when there are none, or when one of a numbered set is missing.
    """
    found = sorted(name for name in names if name.endswith(".safetensors") and not name.startswith("."))
    if WHOLE in found:
        return [WHOLE]
    own = [name for name in found if not name.startswith(FOREIGN)]
    if not own:
        raise CheckpointError(f"{shown(folder, 200)}: {no_weights_reason(folder)}")
    for name in own:
        match = re.fullmatch(r"(.*-)([0-9]{1,6})-of-([0-9]{1,6})\.safetensors", name)
        if match is None:
            continue
        width, total = len(match[2]), int(match[3])
        shards = (f"{match[1]}{number:0{width}}-of-{match[3]}.safetensors" for number in range(1, total + 1))
        if missing := next((shard for shard in shards if shard not in own), None):
            raise CheckpointError(
                f"{shown(folder / missing, 200)} is missing, of {total} such files: the download or the copy is "
                "incomplete"
            )
    return own


def check_places(folder: Path, headers: Mapping[str, ShardHeader], weight_map: Mapping[str, str] | None) -> None:
    """Raises CheckpointError when a tensor is in two files, or not in the one and only that an index names."""
    places: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.tensors:
            where = weight_map.get(name) if weight_map else file
            if where is None:
                raise CheckpointError(
                    f"{shown(folder / file, 200)}: holds tensor {shown(name, 80)}, which {INDEX} does not name: the "
                    "files belong to two models; copy or download the folder again"
                )
            other = where if where != file else places.get(name)
            if other and name in headers[other].tensors:
                raise CheckpointError(
                    f"{shown(folder / file, 200)}: holds tensor {shown(name, 80)}, which {shown(other, 60)} holds as "
                    "well: one is stale; copy or download the folder again"
                )
            places[name] = file
    for name, file in (weight_map or {}).items():
        if name not in headers[file].tensors:
            raise CheckpointError(
                f"{shown(folder / file, 200)}: tensor {shown(name, 80)} is missing, but {INDEX} names it: copy it again"
            )
