"""Small packed folders written without the offline tool: zeros under the right names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzlemoe_vllm.format.codes import get_code
from puzzlemoe_vllm.format.layout import PuzzleConfig, parse_config
from puzzlemoe_vllm.format.shards import INDEX, index_with_records, save_shard, shard_metadata

EXPERTS, HIDDEN, INTERMEDIATE, GROUP = 6, 64, 32, 32
PROJECTIONS = {
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}


def layer_tensors(layer: int, code_name: str | None, merged: int, kept: set[int]) -> dict[str, Tensor]:
    """A layer's tensors: `merged` experts in pairs, the experts `kept` dense, a router."""
    block = f"model.layers.{layer}.mlp"
    tensors = {f"{block}.gate.weight": torch.zeros(EXPERTS, HIDDEN, dtype=torch.bfloat16)}
    for name, shape in PROJECTIONS.items():
        for leader in range(0, merged, 2):
            code = get_code(code_name or "")
            prefix = f"{block}.experts.{leader}.{name}"
            tensors[f"{prefix}.puzzle"] = torch.zeros(code.words_shape(*shape), dtype=code.dtype)
            if code.has_steps:
                tensors[f"{prefix}.puzzle_grid"] = torch.ones(shape[0], shape[1] // GROUP, dtype=torch.bfloat16)
        for expert in kept:
            tensors[f"{block}.experts.{expert}.{name}.weight"] = torch.zeros(shape, dtype=torch.bfloat16)
    return tensors


def write(folder: Path, shards: list[dict[str, Tensor]], quantization: dict[str, Any]) -> PuzzleConfig:
    """A whole folder of those shards, under that `quantization_config`."""
    folder.mkdir(exist_ok=True)
    config = parse_config(quantization)
    (folder / "config.json").write_text(json.dumps({"num_experts": EXPERTS, "quantization_config": quantization}))
    weight_map = {}
    for number, tensors in enumerate(shards):
        name = f"model-{number}.safetensors"
        save_shard(tensors, folder / name, shard_metadata(config.code))
        weight_map |= dict.fromkeys(tensors, name)
    (folder / INDEX).write_text(json.dumps(index_with_records(folder, weight_map, 0, config)))
    return config


KINDS: dict[str, tuple[dict[str, Any], list[tuple[str | None, int, set[int]]]]] = {
    "mask16": ({"code": "mask16", "merged_experts": {"0": 6, "1": 6}}, [("mask16", 6, set()), ("mask16", 6, set())]),
    "angle8": (
        {"code": "angle8", "group_size": GROUP, "merged_experts": {"0": 4}},
        [("angle8", 4, {4, 5}), (None, 0, set(range(EXPERTS)))],
    ),
    "mask6": (
        {"code": "mask6", "group_size": GROUP, "merged_experts": {"1": 2}},
        [(None, 0, set(range(6))), ("mask6", 2, {2, 3, 4, 5})],
    ),
    "trellis6": (
        {"code": "trellis6", "group_size": GROUP, "merged_experts": {"0": 4}},
        [("trellis6", 4, {4, 5}), (None, 0, set(range(6)))],
    ),
    "clusters": ({"clusters": {"0": [0, 0, 2, 2, 0, 2], "1": [5] * 6}}, [(None, 0, {0, 2}), (None, 0, {5})]),
}


def build(folder: Path, kind: str) -> PuzzleConfig:
    """A folder of one of the `KINDS`: a shard for each of two layers, and one with the head."""
    quantization, layers = KINDS[kind]
    shards = [layer_tensors(number, *layer) for number, layer in enumerate(layers)]
    return write(folder, [*shards, {"lm_head.weight": torch.zeros(8, HIDDEN, dtype=torch.bfloat16)}], quantization)
