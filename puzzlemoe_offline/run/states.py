"""Files of hidden states, from which a run goes on; threads write and read their blocks side by side.

One thread would take longer over the states of a layer than several GPUs take over the layer.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor

BLOCK = 1 << 25
"""Bytes of a file that one thread writes or reads at a time."""

THREADS = 8
"""That write or read a file."""

_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}
"""As safetensors spells them."""


def save_state(state: Tensor, path: Path) -> None:
    """Writes hidden states, contiguous on the CPU, as the tensor `state` of a safetensors file, which must not be there
    yet.  Raises OSError."""
    info = {"dtype": _DTYPES[state.dtype], "shape": list(state.shape), "data_offsets": [0, state.nbytes]}
    text = json.dumps({"state": info}, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the values begin aligned
    header = len(text).to_bytes(8, "little") + text
    values = state.flatten().view(torch.uint8).numpy().data

    def write(start: int) -> None:
        left = values[start : start + BLOCK]
        while left:
            written = os.pwrite(descriptor, left, len(header) + start)
            left, start = left[written:], start + written

    with open(path, "xb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:
        descriptor = file.fileno()
        file.write(header)
        list(pool.map(write, range(0, state.nbytes, BLOCK)))


def load_state(path: Path) -> Tensor:
    """The hidden states of a file."""
    return load_file(path)["state"]


class StateRecord(BaseModel):
    """What is kept of a file of hidden states: its bytes, and the SHA-256 of the digests of its blocks."""

    bytes: int
    blocks_sha256: str

    @classmethod
    def of(cls, path: Path) -> StateRecord:
        """Reads the whole file."""
        size = path.stat().st_size

        def digest(start: int) -> bytes:
            with path.open("rb") as file:
                file.seek(start)
                return hashlib.sha256(file.read(BLOCK)).digest()

        with ThreadPoolExecutor(THREADS) as pool:
            blocks = b"".join(pool.map(digest, range(0, size, BLOCK)))
        return cls(bytes=size, blocks_sha256=hashlib.sha256(blocks).hexdigest())
