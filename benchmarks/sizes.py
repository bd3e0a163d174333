"""Bytes of packed models of real shape at every `--bits` and `--dense`: computed, from headers alone.

    python benchmarks/sizes.py --output benchmarks/results/sizes.json

The sizes are those of the tool's plan, which `puzzlemoe compress --dry-run` prints.  Headers are made of transformers'
classes, and of what the hub's checkpoints have beyond them; there are no weights, and nothing is served.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from serving import MODELS
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from puzzlemoe_offline.cli.compress import chosen_method
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.fp8_layers import fp8_weights
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.recipe import CODE_OF_BITS
from puzzlemoe_offline.run.job import Job
from puzzlemoe_offline.version import VERSION
from puzzlemoe_vllm.format.headers import ShardHeader, TensorInfo

_SIGMOID = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "Mixtral-8x7B": MODELS["mixtral-8x7b"],
    "Qwen3-30B-A3B": MODELS["qwen3-30b-a3b"],
    "Qwen3-Next-80B-A3B": {
        "model_type": "qwen3_next",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "full_attention_interval": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "GLM-4.5-Air": {
        "model_type": "glm4_moe",
        "vocab_size": 151552,
        "hidden_size": 4096,
        "num_hidden_layers": 46,
        "first_k_dense_replace": 1,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "use_qk_norm": False,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "n_group": 1,
        "topk_group": 1,
        **_SIGMOID,
    },
    "Qwen3-235B-A22B": MODELS["qwen3-30b-a3b"]
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_group": 8,
        "topk_group": 4,
        **_SIGMOID,
    },
}
"""What sizes depend on of each model's config.json."""

Tensors = dict[str, TensorInfo]


def tensors_of(config: dict[str, Any]) -> Tensors:
    """A checkpoint's tensors in bf16, as transformers' class has them, experts of a layer together, and those for
    multi-token prediction."""
    with torch.device("meta"):
        found = CONFIG_MAPPING[config["model_type"]].from_dict(config)
        model = AutoModelForCausalLM.from_config(found, dtype=torch.bfloat16)
    dtypes = {torch.bfloat16: "BF16", torch.float32: "F32"}
    held = model.state_dict().items()
    tensors = {name: TensorInfo(dtypes[tensor.dtype], tuple(tensor.shape)) for name, tensor in held}
    return tensors | prediction_tensors(config, tensors)


def prediction_tensors(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """Those for multi-token prediction: a decoder layer like one of the model's, and what it has around it."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    # Every fourth layer of Qwen3-Next has full attention, the last one as well.
    like = f"model.layers.{layers - 1}."
    layer = {name.removeprefix(like): info for name, info in tensors.items() if name.startswith(like)}
    norm, joined = TensorInfo("BF16", (hidden,)), TensorInfo("BF16", (hidden, 2 * hidden))
    if config["model_type"] == "qwen3_next":
        around = dict.fromkeys(("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"), norm) | {"fc": joined}
        return {f"mtp.layers.0.{name}": info for name, info in layer.items()} | {
            f"mtp.{name}.weight": info for name, info in around.items()
        }
    if config.get("num_nextn_predict_layers"):
        around = dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), norm) | {"eh_proj": joined}
        around |= dict.fromkeys(("embed_tokens", "shared_head.head"), tensors["lm_head.weight"])
        layer |= {f"{name}.weight": info for name, info in around.items()}
        return {f"model.layers.{layers}.{name}": info for name, info in layer.items()}
    return {}


def sizes_of(config: dict[str, Any]) -> dict[str, Any]:
    """Bytes of routed experts, of everything else and, apart from these, of what is copied: of the model in bf16, and
    packed by `--dense` and `--bits`.  Raises UserError where the tool would refuse the model."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        checkpoint = Checkpoint(Path(folder), {"model.safetensors": ShardHeader(tensors_of(config), {}, "", 0)})
    model = LayerwiseModel(checkpoint, "cpu")
    copied = sum(checkpoint.copied_bytes.values())
    packed = []
    for dense, fp8 in (("bf16", frozenset[str]()), ("fp8", fp8_weights(checkpoint))):
        for bits, code in CODE_OF_BITS.items():
            method = chosen_method("puzzlemoe", None, bits, {})
            method.check(checkpoint)
            sizes = Job(model, method, config["model_type"], fp8=fp8).sizes
            its = {"experts": sizes.experts_after, "other": sizes.other - copied}
            packed.append({"dense": dense, "bits": bits, "code": code} | its)
    bf16 = {"experts": sizes.experts_before, "other": sizes.other_before - copied}
    return {"bf16": bf16, "copied": copied, "packed": packed}


def main() -> None:
    """Writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    result = {
        "versions": {"puzzlemoe-vllm": VERSION, "transformers": transformers.__version__},
        "bytes": {name: sizes_of(config) for name, config in CONFIGS.items()},
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
