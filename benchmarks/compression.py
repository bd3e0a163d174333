"""Compressing decoder layers of real size: seconds per stage and layer, and peak memory.

    python benchmarks/compression.py [--model mixtral-8x7b] [--device cpu|cuda] [--tokens 2048] [--output results.json]

The layers are synthetic (Gaussian weights, random calibration tokens); time and memory do not depend on the values.  A
GPU's first layer also loads its kernels.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from puzzlemoe_offline.calibration.text import Calibration
from puzzlemoe_offline.methods.pairs import PairMethod
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.recipe import PairRecipe, named_recipe
from puzzlemoe_offline.run.job import Job
from puzzlemoe_offline.run.plan import make_plan
from puzzlemoe_offline.run.runner import run

MODELS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "norm_topk_prob": True,
    },
}
LAYERS = 2
VOCABULARY = 8192


def write_model(name: str, folder: Path, device: str) -> None:
    """A checkpoint of `LAYERS` layers with random bf16 weights, drawn on `device`."""
    config = MODELS[name] | {"num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    outside = {
        "model.embed_tokens.weight": random(VOCABULARY, config["hidden_size"], device),
        "model.norm.weight": torch.ones(config["hidden_size"], dtype=torch.bfloat16),
    }
    save_file(outside, folder / "outside.safetensors")
    for layer in range(LAYERS):
        write_layer(config, f"model.layers.{layer}", folder, device)


def random(rows: int, columns: int, device: str) -> torch.Tensor:
    """bf16 [rows, columns], drawn on `device`, on the CPU."""
    return torch.empty(rows, columns, dtype=torch.bfloat16, device=device).normal_(std=columns**-0.5).cpu()


def write_layer(config: dict[str, Any], layer: str, folder: Path, device: str) -> None:
    """One layer's tensors, those of each expert in a file of their own."""
    mixtral = config["model_type"] == "mixtral"
    block, names = (
        ("block_sparse_moe", ("w1", "w3", "w2")) if mixtral else ("mlp", ("gate_proj", "up_proj", "down_proj"))
    )
    hidden, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim", hidden // heads)
    inner = config.get("moe_intermediate_size", config["intermediate_size"])
    experts = config.get("num_local_experts") or config["num_experts"]

    tensors = {f"{layer}.{block}.gate.weight": random(experts, hidden, device)}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{layer}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for projection, rows in (("q", heads * head), ("k", kv * head), ("v", kv * head)):
        tensors[f"{layer}.self_attn.{projection}_proj.weight"] = random(rows, hidden, device)
    tensors[f"{layer}.self_attn.o_proj.weight"] = random(hidden, heads * head, device)
    if not mixtral:
        for norm in ("q_norm", "k_norm"):
            tensors[f"{layer}.self_attn.{norm}.weight"] = torch.ones(head, dtype=torch.bfloat16)
    save_file(tensors, folder / f"{layer}.safetensors")
    for expert in range(experts):
        prefix = f"{layer}.{block}.experts.{expert}"
        shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
        weights = {
            f"{prefix}.{projection}.weight": random(*shape, device)
            for projection, shape in zip(names, shapes, strict=True)
        }
        save_file(weights, folder / f"{prefix}.safetensors")


def peak_host_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, recipe: PairRecipe, device: str, tokens: int) -> dict[str, Any]:
    """Compresses the model once and returns seconds of each layer and bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "source")
        source.mkdir()
        write_model(name, source, device)
        model = LayerwiseModel(Checkpoint(source), device)
        sequence = min(tokens, 2048)
        calibration = Calibration(torch.randint(0, VOCABULARY, (tokens // sequence, sequence)), "random tokens")
        before = peak_host_bytes()
        job = Job(model, PairMethod(recipe), name, tokens=calibration.tokens.numel())
        make_plan(job)  # compiles the kernels of a GPU, as happens once on a machine
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        layers: list[dict[str, float]] = []
        report = run(job, calibration, Path(scratch, "packed"), on_layer=lambda record: layers.append(record.seconds))
    return {
        "model": name,
        "recipe": recipe.model_dump(exclude_none=True),
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.processor() or platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "calibration_tokens": tokens,
        "layer_expert_bytes": report.bytes.experts_before // LAYERS,
        "layer_seconds": layers,
        # The checkpoint's own files are memory-mapped and count here while the system keeps them in memory.
        "peak_host_bytes_over_start": peak_host_bytes() - before,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def main() -> None:
    """Prints the measurement as JSON, and writes it with --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="mixtral-8x7b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--recipe", choices=("default", "paper"), default="paper")
    parser.add_argument("--no-compensate", dest="compensate", action="store_const", const=False)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    recipe = named_recipe(arguments.recipe, compensate=arguments.compensate)
    result = json.dumps(measure(arguments.model, recipe, arguments.device, arguments.tokens), indent=2)
    print(result)
    if arguments.output:
        arguments.output.write_text(result + "\n")


if __name__ == "__main__":
    main()
