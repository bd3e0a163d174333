"""Folders in other formats are named for what they are, with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import build

from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_vllm.errors import UserError


@pytest.fixture
def source(tmp_path) -> Path:
    return build("qwen3_moe", tmp_path / "source")


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        LayerwiseModel(Checkpoint(folder), "cpu")
    text = str(error.value)
    assert len(text) <= 400 and text.isprintable()
    return text


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def compressed_tensors(form: str, kind: str, bits: int, strategy: str) -> dict[str, Any]:
    """As llm-compressor writes it."""
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": []}


BNB = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4", "llm_int8_threshold": 6.0}

QUANTIZED = [
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}, "GPTQ of 4 bits"),
    ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}, "AWQ of 4 bits"),
    ({"quant_method": "auto-round", "bits": 2, "group_size": 64}, "AutoRound of 2 bits"),
    ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "MXFP4, 4.25 bits a weight"),
    (BNB | {"load_in_4bit": True, "_load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes of 4 bits"),
    (BNB | {"load_in_4bit": False, "_load_in_8bit": True, "load_in_8bit": True}, "bitsandbytes of 8 bits"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": {}}, "ModelOpt NVFP4"),
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, "ModelOpt FP8"),
    ({"quant_algo": "NVFP4"}, "NVFP4"),
    ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "FBGEMM's FP8"),
    ({"quant_method": "torchao", "quant_type": {"default": {}}}, "TorchAO"),
    ({"quant_method": "quark"}, "Quark"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, "FP8 in a form that is not read here"),
    ({"quant_method": "something new"}, "something new"),
    ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    (
        compressed_tensors("pack-quantized", "int", 4, "group"),
        "compressed-tensors pack-quantized (int4, a scale a group)",
    ),
    (
        compressed_tensors("int-quantized", "int", 8, "channel"),
        "compressed-tensors int-quantized (int8, a scale a channel)",
    ),
    (
        compressed_tensors("nvfp4-pack-quantized", "float", 4, "tensor_group"),
        "compressed-tensors nvfp4-pack-quantized (float4, a scale a tensor_group)",
    ),
    (
        compressed_tensors("float-quantized", "float", 8, "group"),
        "compressed-tensors float-quantized (float8, a scale a group)",
    ),
]
"""`quantization_config` as the hub's models have it, and what messages call it."""


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        *(({"quantization_config": config}, method) for config, method in QUANTIZED),
        ({"compression_config": {"format": "pack-quantized"}}, "compressed-tensors pack-quantized"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX of 4 bits"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "FP8 in a form that is not read here"),
    ],
)
def test_what_config_json_says(source, changes, method):
    edit_config(source, **changes)
    said = f"config.json: already quantized with {method}; start from the 16-bit original, or from an FP8 one"
    assert said in refusal(source)


@pytest.mark.parametrize(
    ("name", "method"),
    [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ"), ("hf_quant_config.json", "ModelOpt")],
)
def test_what_a_file_beside_config_json_says(source, name, method):
    (source / name).write_text('{"bits": 4}')
    assert f"{name}: already quantized with {method}; start from the 16-bit original" in refusal(source)


@pytest.mark.parametrize("suffix", ["qweight", "weight_packed", "weight_scale_inv", "scales", "weight_scale"])
def test_what_tensors_say(source, suffix):
    path, name = source / "model.safetensors", "model.layers.0.mlp.experts.0.up_proj"
    tensors = load_file(path)
    tensors[f"{name}.{suffix}"] = torch.zeros(4, dtype=torch.int32)
    save_file(tensors, path)
    assert f"tensor {name}.{suffix} is a quantized model's" in refusal(source)


@pytest.mark.parametrize(
    ("prefix", "hint"),
    [
        ("base_model.model.", "merge_and_unload"),
        ("_orig_mod.", "torch.compile"),
        ("module.", "data-parallel"),
        ("language_model.", "multimodal"),
    ],
)
def test_a_wrapper_s_prefix(source, prefix, hint):
    path = source / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path)
    said = refusal(source)
    assert f"tensor names begin with {prefix}: " in said and hint in said


def test_a_prefix_between(source):
    path = source / "model.safetensors"
    renamed = {name.replace("model.layers", "model.language_model.layers"): t for name, t in load_file(path).items()}
    save_file(renamed, path)
    assert "tensor names begin with model.language_model.: " in refusal(source)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model.gguf"], "holds GGUF files"),
        (["pytorch_model.bin"], r"has pickled weights"),
        (["consolidated.00.pth"], "own format"),
        (["consolidated.safetensors"], "own format"),
        (["adapter_model.safetensors"], "has no *.safetensors files"),
        (["model.safetensors.incomplete"], "unfinished downloads"),
        (["model.part"], "has no *.safetensors files; convert"),
    ],
)
def test_folders_without_weights(source, files, message):
    (source / "model.safetensors").unlink()
    for name in files:
        (source / name).touch()
    assert message in refusal(source)


@pytest.mark.parametrize("config", [True, False])
def test_an_adapter(source, config):
    (source / "model.safetensors").rename(source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base" * 100}))
    if not config:
        (source / "config.json").unlink()
    said = refusal(source)
    assert "is a PEFT adapter of owner/base" in said and "merge it into that model" in said


def test_a_folder_of_gguf_files_alone(tmp_path):
    (tmp_path / "model-q4.gguf").touch()
    assert "GGUF" in refusal(tmp_path)
