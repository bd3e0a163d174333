"""Folders that are no dense 16-bit safetensors model: each is named for what it is, with the way out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from puzzlemoe_vllm.errors import UserError, shown
from puzzlemoe_vllm.format.layout import QUANT_METHOD
from puzzlemoe_vllm.format.shards import read_json_object

ORIGINAL = "start from the 16-bit original"

QUANTIZATION_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
"""Files that a quantizer leaves beside the weights, with or without a word in config.json."""

QUANTIZED_SUFFIXES = (
    "qweight",
    "qzeros",
    "scales",
    "weight_packed",
    "weight_scale",
    "weight_scale_2",
    "weight_scale_inv",
    "_blocks",
    "_scales",
    "absmax",
    "quant_map",
)
"""How the names of tensors end that quantizers add."""

PREFIXES = {
    "base_model.model.": "peft wrapped it; merge the adapter (merge_and_unload) and save the model that gives",
    "_orig_mod.": "torch.compile wrapped it; save its _orig_mod",
    "module.": "a data-parallel class wrapped it; save its module",
    "language_model.": "it is a part of a multimodal model; save its language model on its own",
    "model.language_model.": "it is a part of a multimodal model; save its language model on its own",
}
"""What tensor names begin with when a model was saved inside another, and what to do."""


class ForeignFormat(UserError):
    """A model in a format that the tool does not read; the text names it and the way out."""


def check_not_quantized(folder: Path, config: dict[str, Any]) -> None:
    """Raises ForeignFormat when config.json or a file beside it says that another tool quantized the model."""
    where = shown(folder / "config.json", 200)
    text_config = config.get("text_config")
    for fields in (config, text_config if isinstance(text_config, dict) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            raw = fields.get(key)
            if raw is None:
                continue
            if not isinstance(raw, dict):
                raise ForeignFormat(f"{where}: {key} is {shown(repr(raw))}, expected a JSON object: copy it again")
            if key != "quantization_config" or raw.get("quant_method") != QUANT_METHOD:
                raise ForeignFormat(f"{where}: already quantized with {_method(key, raw)}; {ORIGINAL}")
    for name, method in QUANTIZATION_FILES.items():
        if (folder / name).exists():
            raise ForeignFormat(f"{shown(folder / name, 200)}: already quantized with {method}; {ORIGINAL}")


def _method(key: str, raw: dict[str, Any]) -> str:
    """What a quantization_config calls its method."""
    if key == "compression_config":
        return "compressed-tensors"
    named = raw.get("quant_method") or raw.get("quant_algo")
    if named is None and {"bits", "group_size"} <= raw.keys():
        return "MLX"
    return shown(repr(named), 60)


def check_tensor_names(folder: Path, names: Iterable[str], own_prefix: str) -> None:
    """Raises ForeignFormat for tensors that only quantized models have, and for names with a wrapper's prefix.

    own_prefix: what names of the family's language model begin with.
    """
    for name in names:
        if name.endswith(QUANTIZED_SUFFIXES) and ".puzzle" not in name:
            raise ForeignFormat(
                f"{shown(folder, 200)}: tensor {shown(name, 80)} is a quantized model's, whatever config.json says; "
                f"{ORIGINAL}"
            )
        match = re.match(r"((?:\w+\.)*?)(?:model\.)?layers\.\d+\.", name)
        if match and (prefix := match[1]) in PREFIXES and prefix != own_prefix:
            raise ForeignFormat(
                f"{shown(folder, 200)}: tensor names begin with {prefix}: {PREFIXES[prefix]}, or rename the tensors"
            )


def no_config_reason(folder: Path) -> str:
    """Why a folder without config.json is no model folder, as a message goes on."""
    if (folder / "adapter_config.json").exists():
        return _adapter_reason(folder)
    if any(folder.glob("*.gguf")):
        return "holds GGUF files, which are quantized or converted; start from the model's safetensors files"
    return "is missing: not a model folder, or an unfinished one"


def no_weights_reason(folder: Path) -> str:
    """Why a folder has no safetensors weights, as a message goes on."""
    if (folder / "adapter_config.json").exists():
        return _adapter_reason(folder)
    if any(folder.rglob("*.incomplete")):
        return "has no *.safetensors files, but unfinished downloads (*.incomplete): download it again"
    if any(folder.glob("*.gguf")):
        return "holds GGUF files, which are quantized or converted; start from the model's safetensors files"
    if any(folder.glob("consolidated*")):
        return (
            "holds the weights in Mistral's or Meta's own format (consolidated) only; download those in Hugging Face's"
        )
    if any(path for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern)):
        return "has pickled weights (*.bin, *.pth) only, which are never loaded here; convert them to safetensors first"
    return "has no *.safetensors files; convert other weight formats to safetensors first"


def _adapter_reason(folder: Path) -> str:
    base = read_json_object(folder / "adapter_config.json").get("base_model_name_or_path")
    return (
        f"is a PEFT adapter of {shown(base, 80)}, not a model: merge it into that model (merge_and_unload) and save it"
    )
