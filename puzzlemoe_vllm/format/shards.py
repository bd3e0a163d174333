"""A packed folder's files: the index, the safetensors headers, and the digests by which damage to either is found.

Only `record_shard` and `check_digests` read more than headers.  Names and JSON of a folder are not trusted: what a
message repeats of them is cut, and nothing but the folder's own regular files is opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from puzzlemoe_vllm.errors import shown
from puzzlemoe_vllm.format.codes import get_code
from puzzlemoe_vllm.format.fp8 import FP8_BLOCK, FP8_SCALE, scale_shape, scales_name
from puzzlemoe_vllm.format.layout import (
    EXPERT_COUNTS,
    FORMAT_VERSION,
    STEPS,
    WORDS,
    LayoutError,
    PuzzleConfig,
    decoder_layer,
    layout_digest,
)

INDEX = "model.safetensors.index.json"

CARD = "README.md"

VERSION_KEY, CODE_KEY = "puzzlemoe_format_version", "puzzlemoe_code"
"""Keys of a packed shard's safetensors metadata."""

LARGEST_HEADER = 100_000_000
"""Bytes; what safetensors itself accepts."""

LARGEST_INDEX = 500_000_000
"""Bytes: some millions of tensors."""

BLOCK = 4 << 20
"""Bytes read at a time for a digest."""

LFS_POINTER = b"version https://git-lfs"

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

DTYPE_BITS = (
    dict.fromkeys(("F4",), 4)
    | dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6)
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 16)
    | dict.fromkeys(("U32", "I32", "F32"), 32)
    | dict.fromkeys(("U64", "I64", "F64", "C64"), 64)
)
"""Bits of an element, by safetensors' names of dtypes."""

FP8_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
"""safetensors' names of 8-bit floats; the first is that of FP8 weights."""

STORED_DTYPES = {"int16": "I16", "uint8": "U8"}
"""safetensors' names of the dtypes that words have."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its header describes it; dtype as safetensors spells it, e.g. BF16."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ShardHeader:
    """The header of a safetensors file.  sha256: of its JSON text as it stands in the file; bytes: of all the file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    sha256: str
    bytes: int


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


class _PackedMetadata(_Records):
    """The same of a packed folder."""

    layout_sha256: str


def _fault(path: Path, text: str) -> LayoutError:
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
            raise _fault(path, "is a link to a file outside the model folder: put the file itself there")
        if not stat.S_ISREG(path.stat().st_mode):
            raise _fault(path, "is not a regular file: copy or download it again")
        return path.open("rb")
    except FileNotFoundError:
        raise _fault(path, "is missing: the download or the copy is incomplete") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links, in Python before 3.13
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise _fault(path, f"cannot be read ({shown(reason)})") from None


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
        raise _fault(path, f"{what}JSON is nested too deeply: copy or download the file again") from None
    except ValueError as error:
        raise _fault(path, f"{what}is not valid JSON ({shown(error)}): copy or download the file again") from None
    if not isinstance(data, dict):
        raise _fault(path, f"{what}is not a JSON object: copy or download the file again")
    if _SURROGATE.search(text):
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _fault(path, f"{what}holds half a character, which no file can: copy or download it again") from None
    return data


def read_json_object(path: Path, largest: int = LARGEST_INDEX) -> dict[str, Any]:
    """A JSON file of a model folder.

    Raises LayoutError as `open_regular` and `parse_json_object` do, and for a file of more than `largest` bytes.
    """
    with open_regular(path) as file:
        text = file.read(largest + 1)
    if len(text) > largest:
        raise _fault(path, f"has more than {largest} bytes: it is not what its name says")
    return parse_json_object(path, text)


def _check_file_name(index: Path, name: object) -> None:
    """Raises LayoutError unless an index may name such a file: a plain name, of a file inside the folder."""
    plain = (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(letter in name for letter in "/\\\0")
        and len(name.encode("utf-8", "surrogatepass")) <= 255
    )
    if not plain:
        raise _fault(index, f"names {shown(repr(name))}, which is no plain file name inside the folder: copy it again")


def _weight_map(path: Path, index: dict[str, Any]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _fault(path, "has no weight_map of file names: copy or download it again")
    for name in weight_map.values():
        if not isinstance(name, str):
            _check_file_name(path, name)
    for name in set(weight_map.values()):
        _check_file_name(path, name)
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


def read_header(path: Path) -> ShardHeader:
    """The header of a safetensors file.  Raises LayoutError when it is damaged, or does not fit the file's size."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = header_length(path, file.read(len(LFS_POINTER)), size)
        file.seek(8)
        text = file.read(length)
    return parse_header(path, text, size)


def header_length(path: Path, start: bytes, size: int) -> int:
    """Bytes of a header's JSON text, which begins at byte 8, given a file's first bytes and its size.  Raises
    LayoutError for what is no safetensors file."""
    if start.startswith(LFS_POINTER):
        raise _fault(path, "is a git-lfs pointer, not the weights: run git lfs pull")
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(LARGEST_HEADER, size - 8):
        raise _fault(path, "is no safetensors file, or cut short: copy or download it again")
    return length


def parse_header(path: Path, text: bytes, size: int) -> ShardHeader:
    """The header of a file of `size` bytes.  Raises LayoutError when it is damaged, or does not fit that size."""
    length = len(text)
    fields = parse_json_object(path, text, "header ")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _fault(path, "header's __metadata__ is not text by name: copy or download the file again")
    tensors = {name: _tensor(path, name, fields[name]) for name in fields}
    end = 0
    for (first, last), name in sorted((offsets, name) for name, (_, offsets) in tensors.items()):
        if first != end:
            raise _fault(
                path, f"data of tensor {shown(name)} overlaps or leaves a hole: copy or download the file again"
            )
        end = last
    if end != size - 8 - length:
        raise _fault(
            path, f"has {size - 8 - length} bytes of tensors, its header says {end}: copy or download the file again"
        )
    infos = {name: info for name, (info, _) in tensors.items()}
    return ShardHeader(infos, metadata, hashlib.sha256(text).hexdigest(), size)


def _tensor(path: Path, name: str, fields: Any) -> tuple[TensorInfo, tuple[int, int]]:
    """A tensor's description, and where its bytes begin and end."""
    fields = fields if isinstance(fields, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise _fault(path, f"header of tensor {shown(name)} is damaged: copy or download the file again")
    if dtype not in DTYPE_BITS:
        raise _fault(path, f"tensor {shown(name)} is of the unknown dtype {shown(dtype, 20)}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _fault(
            path,
            f"tensor {shown(name)} of dtype {dtype} and shape {shown(tuple(shape))} does not fit its bytes: "
            "copy or download the file again",
        )
    return TensorInfo(dtype, tuple(shape)), (offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    """Whether it is a short list of sizes."""
    return (
        isinstance(value, list) and len(value) <= 16 and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )


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


def file_digest(path: Path, folder: Path | None = None) -> str:
    """SHA-256 of a whole file, read in blocks.  folder: as in `open_regular`, which says what it raises, too."""
    digest = hashlib.sha256()
    with open_regular(path, folder) as file:
        try:
            while block := file.read(BLOCK):
                digest.update(block)
        except OSError as error:
            raise _fault(path, f"cannot be read ({shown(error.strerror)})") from None
    return digest.hexdigest()


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


def _index_of(folder: Path, kind: type[Metadata]) -> tuple[dict[str, str], Metadata]:
    """The index of a folder that this project wrote: file names by tensor name, and the records of those files."""
    path = folder / INDEX
    index = read_json_object(path)
    weight_map = _weight_map(path, index)
    try:
        metadata = kind.model_validate(index.get("metadata"))
    except ValidationError:
        raise _fault(
            path, "has no digests of the shards: it is not this model's own; copy it again or compress the source again"
        ) from None
    if metadata.shards.keys() != set(weight_map.values()):
        raise _fault(path, "its digests are of other files than it names: copy or download it again")
    return weight_map, metadata


def check_headers(
    folder: Path, config: PuzzleConfig, found: dict[str, ShardHeader] | None = None
) -> dict[str, ShardHeader]:
    """Headers by file name of a packed folder that holds exactly what was written, as far as headers tell.

    config: `quantization_config` of its config.json.  found: headers of files that are not in the folder.
    Raises LayoutError: one line that names the file or tensor and the way out.
    """
    weight_map, metadata = _index_of(folder, _PackedMetadata)
    _check_no_others(folder, metadata.shards)
    headers = {}
    for name, record in sorted(metadata.shards.items()):
        header = headers[name] = read_header(folder / name) if found is None else found[name]
        _check_metadata(folder / name, header.metadata, config)
        if header.sha256 != record.header_sha256 or header.bytes != record.bytes:
            raise _fault(
                folder / name,
                f"its tensors are not those that {INDEX} was written with{_difference(name, header, weight_map)}: "
                "it was changed or belongs to another model; copy or download the folder again",
            )
        for tensor in header.tensors:
            if weight_map.get(tensor) != name:
                raise _fault(folder / INDEX, f"does not name tensor {shown(tensor)} of {shown(name)}: copy it again")
    held = sum(len(header.tensors) for header in headers.values())
    if held != len(weight_map):
        tensor = next(name for name, file in weight_map.items() if name not in headers[file].tensors)
        raise _fault(folder / weight_map[tensor], f"tensor {shown(tensor)} is missing: copy or download it again")
    _check_experts(folder, headers, config)
    _check_fp8(folder, headers, config)
    if layout_digest(config) != metadata.layout_sha256:
        raise _fault(
            folder / "config.json",
            "quantization_config is not the one that the model was written with: it was edited, or belongs to another "
            "model; copy or download it again",
        )
    return headers


def _difference(file: str, header: ShardHeader, weight_map: dict[str, str]) -> str:
    """How the tensors of a changed shard differ by name, as a message goes on."""
    named = {name for name, where in weight_map.items() if where == file}
    if lost := sorted(named - header.tensors.keys()):
        return f" ({shown(lost[0])} is missing)"
    if strays := sorted(header.tensors.keys() - named):
        return f" ({shown(strays[0])} is not the model's)"
    return ""


def _check_no_others(folder: Path, shards: Iterable[str]) -> None:
    """No other weights that some loader would read instead, or as well."""
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in shards:
            raise _fault(
                path, f"is none of the files that {INDEX} names, but loaders may read it: move it out of the folder"
            )


def _check_metadata(path: Path, metadata: dict[str, str], config: PuzzleConfig) -> None:
    if (version := metadata.get(VERSION_KEY)) != str(FORMAT_VERSION):
        found = f"is of format version {shown(version, 20)}" if version else "is no shard of a packed model"
        raise _fault(path, f"{found}, config.json is of {FORMAT_VERSION}: copy the folder again or compress again")
    if (code := metadata.get(CODE_KEY)) != config.code:
        raise _fault(
            path,
            f"holds {shown(code, 20)} words, config.json says {config.code}: it was edited or belongs to another "
            "model; copy or download it again",
        )


@dataclass(frozen=True)
class _ExpertTensor:
    name: str
    file: str
    info: TensorInfo


def _check_experts(folder: Path, headers: dict[str, ShardHeader], config: PuzzleConfig) -> None:
    """The routed experts' tensors are exactly those that config.json names, in the dtypes and shapes that fit."""
    layers: dict[int, dict[tuple[int, str, str], _ExpertTensor]] = {}
    projections: set[str] = set()
    for file, header in headers.items():
        for name, info in header.tensors.items():
            layer, (_, found, below) = decoder_layer(name), name.partition(".experts.")
            if layer is None or not found:
                continue
            part = re.fullmatch(r"(\d{1,9})\.(\w+)\.(\w+)", below)
            if part is None or part[3] not in (WORDS, STEPS, "weight"):
                if layer in config.merged_experts or layer in config.clusters:
                    raise _fault(folder / file, f"{shown(name)} is no tensor of a packed layer: compress again")
                continue
            projections.add(part[2])
            layers.setdefault(layer, {})[int(part[1]), part[2], part[3]] = _ExpertTensor(name, file, info)
    count = _expert_count(folder)
    for layer in sorted(config.merged_experts.keys() | config.clusters.keys() | layers.keys()):
        _check_layer(folder, layer, layers.get(layer, {}), projections, count, config)


def _expert_count(folder: Path) -> int | None:
    """Routed experts of a layer, from config.json; None when it does not say."""
    config = read_json_object(folder / "config.json")
    fields = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(fields, dict)
    counts = (fields.get(key) for key in EXPERT_COUNTS)
    return next((count for count in counts if type(count) is int and count > 0), None)


def _check_layer(
    folder: Path,
    layer: int,
    tensors: dict[tuple[int, str, str], _ExpertTensor],
    projections: set[str],
    count: int | None,
    config: PuzzleConfig,
) -> None:
    merged, centres = config.merged_experts.get(layer, 0), config.clusters.get(layer)
    leaders, kept = ({expert for expert, _, kind in tensors if (kind == "weight") == dense} for dense in (False, True))
    total = len(centres) if centres else count if count is not None else max(kept | {merged - 1}) + 1
    where = f"layer {layer} of config.json's quantization_config"
    if merged > total:
        raise _fault(folder / "config.json", f"merges {merged} experts of layer {layer}, the model has {total}")
    if count is not None and total != count:
        raise _fault(folder / "config.json", f"clusters of {total} experts in layer {layer}, the model has {count}")
    # One more than there are is enough to be missed: sizes in config.json may be anything.
    dense = set(centres) if centres else set(range(merged, min(total, merged + len(kept) + 1)))
    pairs = range(min(merged // 2, len(leaders) + 1))
    stored = [(2 * pair, kind) for pair in pairs for kind in (WORDS, *((STEPS,) if config.group_size else ()))]
    expected = {
        (expert, projection, kind)
        for expert, kind in [*stored, *((expert, "weight") for expert in sorted(dense))]
        for projection in projections
    }
    advice = "config.json was edited or belongs to another model; copy or download the folder again"
    if strays := sorted(tensors.keys() - expected):
        stray = tensors[strays[0]]
        raise _fault(folder / stray.file, f"holds {shown(stray.name)}, which {where} does not name: {advice}")
    if missing := sorted(expected - tensors.keys()):
        expert, projection, kind = missing[0]
        raise _fault(
            folder, f"has no {kind} of expert {expert}, {shown(projection, 40)}, which {where} names: {advice}"
        )
    for projection in projections if merged or centres else ():
        _check_projection(folder, {key: tensor for key, tensor in tensors.items() if key[1] == projection}, config)


def _check_projection(folder: Path, tensors: dict[tuple[int, str, str], _ExpertTensor], config: PuzzleConfig) -> None:
    """The tensors of one projection in one layer have the dtypes of their kind and all the same size."""
    code = get_code(config.code) if config.code else None
    sizes: tuple[int, ...] | None = None
    for (_, _, kind), tensor in sorted(tensors.items(), key=lambda item: (item[0][2] == STEPS, item[0])):
        dtype, shape = "BF16", tensor.info.shape
        unpacked: tuple[int, ...] | None = shape if len(shape) == 2 else None
        if kind == WORDS and code is not None:
            dtype = STORED_DTYPES[str(code.dtype).removeprefix("torch.")]
            unpacked = code.matrix_shape((shape[0], shape[1])) if len(shape) == 2 else None
        elif kind == STEPS and config.group_size and unpacked:
            unpacked = (shape[0], shape[1] * config.group_size)
        if tensor.info.dtype != dtype:
            raise _fault(
                folder / tensor.file,
                f"{shown(tensor.name)} is of dtype {tensor.info.dtype}, expected {dtype}: compress the source again",
            )
        sizes = sizes or unpacked
        if unpacked is None or unpacked != sizes:
            raise _fault(
                folder / tensor.file,
                f"{shown(tensor.name)} of shape {shown(shape)} does not fit the layer's experts of {sizes}: "
                "compress the source again",
            )


def _check_fp8(folder: Path, headers: dict[str, ShardHeader], config: PuzzleConfig) -> None:
    """The tensors in FP8 are exactly the layers that config.json names, and each has its scales."""
    weights = {f"{layer}.weight" for layer in config.fp8}
    found = {name: (file, info) for file, header in headers.items() for name, info in header.tensors.items()}
    scales = {scales_name(name): name for name in weights}
    for name, (file, info) in found.items():
        if (info.dtype in FP8_DTYPES and name not in weights) or (name.endswith(FP8_SCALE) and name not in scales):
            raise _fault(
                folder / file,
                f"holds {shown(name)}, but config.json's quantization_config does not name its layer in fp8: it was "
                "edited or belongs to another model; copy or download the folder again",
            )
    for scale, weight in scales.items():
        for name in (weight, scale):
            if name not in found:
                raise _fault(folder, f"has no {shown(name)}, whose layer config.json's quantization_config has in fp8")
        (file, stored), (_, held) = found[weight], found[scale]
        shape = scale_shape(stored.shape, (FP8_BLOCK, FP8_BLOCK)) if len(stored.shape) == 2 else None
        if stored.dtype != FP8_DTYPES[0] or held != TensorInfo("F32", shape or ()):
            raise _fault(
                folder / file,
                f"{shown(weight)} is {stored.dtype} {shown(stored.shape)} and {held.dtype} {shown(held.shape)}: "
                f"expected {FP8_DTYPES[0]}, and F32 for its blocks; compress the source again",
            )


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
    files = _index_of(folder, _Records)[1].files
    for name in files:
        for part in name.split("/"):
            _check_file_name(folder / INDEX, part)
    there = {name: os.path.lexists(folder / name) for name in files if name != CARD or os.path.lexists(folder / name)}
    return [name for name in sorted(there) if not there[name] or file_digest(folder / name, folder) != files[name]]


def check_digests(folder: Path, workers: int | None = None) -> None:
    """Every byte of every shard is as it was written.  Reads all of them, `workers` at a time (one a core).

    Raises LayoutError naming the first file that is damaged.
    """
    _, metadata = _index_of(folder, _Records)

    def check(item: tuple[str, ShardRecord]) -> None:
        name, record = item
        if file_digest(folder / name) != record.sha256:
            raise _fault(folder / name, "is damaged, its SHA-256 is not the index's: copy or download it again")

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for _ in pool.map(check, sorted(metadata.shards.items())):
            pass
