"""What a model of DeepSeek-V3's size will take, from the headers of 163 files in FP8, in seconds."""

from __future__ import annotations

import json
import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from support.command import puzzlemoe
from support.fp8 import FORMS
from support.models import CONFIGS
from support.sparse import fp8, write_sparse
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

LAYERS, DENSE_LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 61, 3, 256, 7168, 2048
SECONDS = 30
"""Of processor time, on a machine of any kind: it takes about 5."""

SIZES = {
    "num_hidden_layers": LAYERS,
    "mlp_only_layers": list(range(DENSE_LAYERS)),
    "hidden_size": HIDDEN,
    "intermediate_size": 18432,
    "moe_intermediate_size": INTERMEDIATE,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def source(tmp_path) -> Path:
    """90,000 tensors, half of them scales."""
    config = {"model_type": "qwen3_moe", **CONFIGS["qwen3_moe"], **SIZES}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3_moe"].from_dict(config))
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if ".mlp.experts." not in name}
    for layer in range(DENSE_LAYERS, LAYERS):
        for expert in range(EXPERTS):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            shapes |= {f"{prefix}.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
            shapes[f"{prefix}.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    folder = tmp_path / "source"
    write_sparse(folder, fp8(shapes), 163)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": FORMS["deepseek"]}))
    return folder


def test_a_dry_run_takes_seconds(source, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**13, 0, 10**13))
    text = tmp_path / "text"
    text.write_text("It was the best of times.\n")
    options = "--calibration", text, "--device", "cpu", "--dense", "fp8", "--dry-run"
    began = time.process_time()
    assert puzzlemoe("compress", source, tmp_path / "out", *options) == 0
    assert time.process_time() - began < SECONDS
    said = capsys.readouterr().out
    assert "654.1 GB -> 332.1 GB" in said  # FP8 with scales to words of 8 bits for two with steps
    assert "GB, unchanged" in said and not (tmp_path / "out").exists()
