"""Models of real size without weights: safetensors files that are a header and a hole."""

from __future__ import annotations

import json
import math
from pathlib import Path

from support.fp8 import is_quantized

BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def write_sparse(folder: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], files: int) -> None:
    """Writes numbered shards and their index; tensors: dtype, as headers spell it, and shape by name."""
    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map = list(tensors), {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:06d}.safetensors"
        fields, end = {}, 0
        for name in names[len(names) * number // files : len(names) * (number + 1) // files]:
            dtype, shape = tensors[name]
            start, end = end, end + math.prod(shape) * BYTES[dtype]
            fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
            weight_map[name] = file
        header = json.dumps(fields).encode()
        with (folder / file).open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            out.truncate(8 + len(header) + end)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def fp8(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A model's tensors with its linear layers in FP8 by blocks, as DeepSeek-V3's hub model has them."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if is_quantized(name, shape):
            tensors[name] = ("F8_E4M3", shape)
            tensors[f"{name}_scale_inv"] = ("F32", tuple(-(-size // 128) for size in shape))
        else:
            tensors[name] = ("F32" if name.endswith("e_score_correction_bias") else "BF16", shape)
    return tensors
