"""Folders that are no dense 16-bit safetensors model: each is named for what it is, with the way out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from puzzlemoe_offline.model.fp8 import form_of
from puzzlemoe_vllm.errors import UserError, shown
from puzzlemoe_vllm.format.files import read_json_object
from puzzlemoe_vllm.format.layout import QUANT_METHOD

ORIGINAL = "start from the 16-bit original, or from an FP8 one"

METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "mxfp4": "MXFP4, 4.25 bits a weight",
    "fbgemm_fp8": "FBGEMM's FP8",
    "modelopt": "ModelOpt",
    "modelopt_fp4": "ModelOpt",
    "auto-round": "AutoRound",
    "torchao": "TorchAO",
    "quark": "Quark",
    "fp8": "FP8 in a form that is not read here",
}
"""What messages call a `quant_method`, where its own name says less."""

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
            readable = fields is config and (raw.get("quant_method") == QUANT_METHOD or form_of(raw))
            if key != "quantization_config" or not readable:
                raise ForeignFormat(f"{where}: already quantized with {_method(key, raw)}; {ORIGINAL}")
    for name, method in QUANTIZATION_FILES.items():
        if (folder / name).exists():
            raise ForeignFormat(f"{shown(folder / name, 200)}: already quantized with {method}; {ORIGINAL}")


def _method(key: str, raw: dict[str, Any]) -> str:
    """What a quantization_config calls its method, with what it says of bits."""
    named = raw.get("quant_method")
    if key == "compression_config" or named == "compressed-tensors":
        return _compressed_tensors(raw)
    if named is None and "quant_algo" not in raw and {"bits", "group_size"} <= raw.keys():
        named = "MLX"
    known = METHODS.get(named) if isinstance(named, str) else None
    said = [known or named, raw.get("quant_algo"), _bits(raw)]
    return shown(" ".join(str(part) for part in said if part), 60)


def _bits(raw: dict[str, Any]) -> str | None:
    bits = next((raw[key] for key in ("bits", "w_bit") if key in raw), None)
    for number in (4, 8):
        if raw.get(f"load_in_{number}bit") or raw.get(f"_load_in_{number}bit"):  # bitsandbytes
            bits = number
    return None if bits is None else f"of {bits} bits"


def _compressed_tensors(raw: dict[str, Any]) -> str:
    """Its format, and the weights of its first group."""
    said = f"compressed-tensors {raw.get('format') or ''}".strip()
    match raw.get("config_groups"):
        case {**groups} if groups:
            match next(iter(groups.values())):
                case {"weights": {"type": kind, "num_bits": bits, **rest}}:
                    said += f" ({kind}{bits}, a scale a {rest.get('strategy', 'tensor')})"
    return shown(said, 100)


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
