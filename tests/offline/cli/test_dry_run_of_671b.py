"""What DeepSeek-V3 will take, from the headers of 163 files in FP8, in seconds."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest
from support.command import puzzlemoe
from support.fp8 import FORMS
from support.model_configs import CONFIGS
from support.model_shapes import Shapes, model_shapes
from support.sparse import fp8, write_sparse

SECONDS = 30
"""Of processor time, on a machine of any kind: it takes about 5."""

CONFIG = {
    "model_type": "deepseek_v3",
    **CONFIGS["deepseek_v3"],
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
}


@pytest.fixture
def shapes() -> Shapes:
    return model_shapes(CONFIG)


@pytest.fixture
def source(shapes, tmp_path) -> Path:
    """92,000 tensors, half of them scales."""
    folder = tmp_path / "source"
    write_sparse(folder, fp8(shapes), 163)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": FORMS["deepseek"]}))
    return folder


def test_the_shapes_are_those_of_the_real_model(shapes):
    decoder = [shape for name, shape in shapes.items() if not name.startswith("model.layers.61.")]
    assert round(sum(map(math.prod, decoder)) / 1e9) == 671


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
    assert "34.5 GB -> 46.0 GB" in said  # 11.5 billion weights for multi-token prediction in bf16
    assert not (tmp_path / "out").exists()
