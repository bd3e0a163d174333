"""FP8 versions of tiny checkpoints, with the names, scales and config.json that the hub's have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"

_DEEPSEEK = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


def _llm_compressor(strategy: str, dynamic: bool, **weights: Any) -> dict[str, Any]:
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": dynamic}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "output_activations": None,
                "input_activations": inputs | {"strategy": "token" if dynamic else "tensor"},
                "weights": {
                    "num_bits": 8,
                    "type": "float",
                    "symmetric": True,
                    "dynamic": False,
                    "group_size": None,
                    "block_structure": None,
                    "strategy": strategy,
                }
                | weights,
            }
        },
    }


FORMS: dict[str, dict[str, Any]] = {
    "deepseek": _DEEPSEEK,
    "deepseek-ue8m0": _DEEPSEEK | {"scale_fmt": "ue8m0"},
    "qwen": _DEEPSEEK | {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]},
    "fused": _DEEPSEEK | {"modules_to_not_convert": ["lm_head"]},
    "autofp8": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    "FP8_DYNAMIC": _llm_compressor("channel", True),
    "FP8": _llm_compressor("tensor", False),
    "FP8_BLOCK": _llm_compressor("block", True, block_structure=[128, 128]),
}
"""`quantization_config` by form: named after who writes it, or llm-compressor's scheme."""


def write_fp8(source: Path, folder: Path, form: str, more: tuple[str, ...] = ()) -> Path:
    """Writes the FP8 version of a bf16 model; returns its folder.  more: ends of names that are in FP8, too."""
    shutil.copytree(source, folder)
    quantization = FORMS[form]
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source / WEIGHTS).items():
        if not (is_quantized(name, tensor.shape) or name.endswith(more)):
            tensors[name] = tensor
            continue
        tensors[name], scale = _quantize(tensor, form)
        tensors[name + ("_scale_inv" if "weight_block_size" in quantization else "_scale")] = scale
        if form in ("autofp8", "FP8"):
            tensors[name.removesuffix("weight") + "input_scale"] = torch.full_like(scale, 0.5)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    return folder


def write_bf16(quantized: Path, folder: Path) -> Path:
    """Writes the bf16 model that an FP8 one stands for, weight by weight; returns its folder."""
    shutil.copytree(quantized, folder)
    stored = load_file(quantized / WEIGHTS)
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith(("_scale", "_scale_inv")):
            continue
        scale = stored.get(f"{name}_scale", stored.get(f"{name}_scale_inv"))
        tensors[name] = tensor if scale is None else _dequantize(tensor, scale.float())
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((quantized / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def is_quantized(name: str, shape: Sequence[int]) -> bool:
    """Linear layers, but for the head, routers and what else the hub's models have in bf16."""
    linear = "_proj" in name or name.endswith((".w1.weight", ".w2.weight", ".w3.weight"))
    kept = name.endswith(("eh_proj.weight", "in_proj_ba.weight", "in_proj_b.weight", "in_proj_a.weight"))
    return linear and len(shape) > 1 and not kept


def _quantize(weight: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """FP8 and its scales."""
    if weight.dim() == 3:
        parts = [_quantize(part, form) for part in weight]
        return torch.stack([part for part, _ in parts]), torch.stack([scale for _, scale in parts])
    rows, columns = weight.shape
    high, wide = {"FP8_DYNAMIC": (1, columns), "autofp8": (rows, columns), "FP8": (rows, columns)}.get(form, (128, 128))
    scales = torch.empty(-(-rows // high), -(-columns // wide))
    stored = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    if form in ("qwen", "FP8_DYNAMIC", "FP8", "FP8_BLOCK"):
        scales = scales.bfloat16()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
            block = weight[place].float()
            scale = (block.abs().max() / 448).clamp(min=2**-20)  # rows of zeros
            scales[i, j] = scale.log2().ceil().exp2() if form == "deepseek-ue8m0" else scale
            stored[place] = (block / scales[i, j].float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    shape = {"autofp8": (), "FP8": (1,)}.get(form, scales.shape)
    return stored, scales.reshape(shape)


def _dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """By the definition, an entry at a time as far as scales go."""
    if weight.dim() == 3:
        return torch.stack([_dequantize(*part) for part in zip(weight, scale, strict=True)])
    rows, columns = weight.shape
    if scale.numel() == 1:
        return (weight.float() * scale).bfloat16()
    wide = columns if scale.shape[1] == 1 and scale.shape[0] == rows else 128
    high = 1 if scale.shape[0] == rows else 128
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    for row in range(rows):
        for start in range(0, columns, wide):
            part = weight[row, start : start + wide].float() * scale[row // high, start // wide]
            out[row, start : start + wide] = part.bfloat16()
    return out
