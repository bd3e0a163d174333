"""The headers of safetensors files, read and checked without their tensors."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puzzlemoe_vllm.errors import shown
from puzzlemoe_vllm.format.files import fault, open_regular, parse_json_object

LARGEST_HEADER = 100_000_000
"""Bytes; what safetensors itself accepts."""

LFS_POINTER = b"version https://git-lfs"

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
        raise fault(path, "is a git-lfs pointer, not the weights: run git lfs pull")
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(LARGEST_HEADER, size - 8):
        raise fault(path, "is no safetensors file, or cut short: copy or download it again")
    return length


def parse_header(path: Path, text: bytes, size: int) -> ShardHeader:
    """The header of a file of `size` bytes.  Raises LayoutError when it is damaged, or does not fit that size."""
    length = len(text)
    fields = parse_json_object(path, text, "header ")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fault(path, "header's __metadata__ is not text by name: copy or download the file again")
    tensors = {name: _tensor(path, name, fields[name]) for name in fields}
    end = 0
    for (first, last), name in sorted((offsets, name) for name, (_, offsets) in tensors.items()):
        if first != end:
            raise fault(
                path, f"data of tensor {shown(name)} overlaps or leaves a hole: copy or download the file again"
            )
        end = last
    if end != size - 8 - length:
        raise fault(
            path, f"has {size - 8 - length} bytes of tensors, its header says {end}: copy or download the file again"
        )
    infos = {name: info for name, (info, _) in tensors.items()}
    return ShardHeader(infos, metadata, hashlib.sha256(text).hexdigest(), size)


def _tensor(path: Path, name: str, fields: Any) -> tuple[TensorInfo, tuple[int, int]]:
    """A tensor's description, and where its bytes begin and end."""
    fields = fields if isinstance(fields, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise fault(path, f"header of tensor {shown(name)} is damaged: copy or download the file again")
    if dtype not in DTYPE_BITS:
        raise fault(path, f"tensor {shown(name)} is of the unknown dtype {shown(dtype, 20)}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise fault(
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
