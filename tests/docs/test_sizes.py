"""benchmarks/sizes.py makes up the headers of the real models, and its committed figures are the tool's own."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
from support.command import puzzlemoe
from support.model_shapes import model_shapes
from support.scripts import load_script
from support.sparse import write_sparse

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("Mixtral-8x7B", "Qwen3-30B-A3B", "Qwen3-Next-80B-A3B", "GLM-4.5-Air", "Qwen3-235B-A22B", "DeepSeek-V3")


@pytest.fixture(scope="module")
def sizes():
    return load_script("benchmarks/sizes.py")


@pytest.fixture(scope="module")
def committed():
    return json.loads((ROOT / "benchmarks" / "results" / "sizes.json").read_text())["bytes"]


@pytest.mark.parametrize("model", MODELS)
def test_the_headers_have_what_the_hubs_checkpoints_have(model, sizes):
    config = sizes.CONFIGS[model]
    made, real = ({name: info.shape for name, info in sizes.tensors_of(config).items()}, model_shapes(config))
    assert outside_experts(made) == outside_experts(real)
    assert weights_of_experts(made) == weights_of_experts(real)


def outside_experts(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """transformers calls Mixtral's block `mlp`, and so may a checkpoint."""
    return {
        name.replace(".block_sparse_moe.", ".mlp."): tuple(shape)
        for name, shape in shapes.items()
        if ".experts." not in name
    }


def weights_of_experts(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """By decoder layer."""
    counts: Counter[str] = Counter()
    for name, shape in shapes.items():
        if ".experts." in name:
            counts[re.search(r"(mtp\.)?layers\.\d+", name)[0]] += math.prod(shape)
    return counts


@pytest.mark.parametrize(("model", "billions"), [("Mixtral-8x7B", 46.7), ("Qwen3-235B-A22B", 235.1)])
def test_the_committed_bytes_are_what_the_script_finds(model, billions, sizes, committed):
    assert list(committed) == list(sizes.CONFIGS) == list(MODELS)
    found = sizes.sizes_of(sizes.CONFIGS[model])
    assert found == committed[model], "run python benchmarks/sizes.py"
    assert sum(found["bf16"].values()) / 2e9 == pytest.approx(billions, abs=0.05)


def test_a_dry_run_says_the_same(sizes, committed, tmp_path, monkeypatch, capsys):
    """Of a checkpoint with the hub's names, its experts one by one."""
    config = sizes.CONFIGS["Mixtral-8x7B"]
    shapes = model_shapes(config)
    write_sparse(tmp_path / "source", {name: ("BF16", shape) for name, shape in shapes.items()}, 19)
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    text = tmp_path / "text"
    text.write_text("It was the best of times.\n")
    # Merges a sample, to tell the time.
    monkeypatch.setattr("puzzlemoe_offline.run.plan._seconds", lambda job, devices: 0.0)
    # This machine's disk may have no room for 22 GB.
    monkeypatch.setattr("puzzlemoe_offline.run.output.ModelFolder._check_space", lambda folder, needed: None)
    options = "--calibration", text, "--device", "cpu", "--bits", "2", "--dense", "fp8", "--dry-run"
    assert puzzlemoe("compress", tmp_path / "source", tmp_path / "out", *options) == 0
    (row,) = (row for row in committed["Mixtral-8x7B"]["packed"] if (row["bits"], row["dense"]) == ("2", "fp8"))
    said = capsys.readouterr().out
    assert f"-> {row['experts'] / 1e9:.1f} GB" in said and f"-> {row['other'] / 1e9:.1f} GB" in said
