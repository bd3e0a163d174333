"""benchmarks/kernels.py: the layers that it measures have the sizes that kernels are tested at, and fit into a GPU; a
run that is cut short keeps what it measured."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from support.layers import DEEPSEEK, DEEPSEEK_V3, GLM_AIR, MINIMAX_M2, MIXTRAL, QWEN3, QWEN3_NEXT, QWEN15
from support.scripts import load_script

L2 = 50e6
"""Bytes of the L2 cache of an H100 or H200."""
MEMORY = 78 * 2**30
"""Bytes of an H100 that a process can have."""

LAYERS = {
    "Mixtral-8x7B": MIXTRAL,
    "Qwen3-30B-A3B": QWEN3,
    "DeepSeek-MoE-16B": DEEPSEEK,
    "Qwen1.5-MoE": QWEN15,
    "GLM-4.5-Air": GLM_AIR,
    "Qwen3-Next-80B-A3B": QWEN3_NEXT,
    "DeepSeek-V3": DEEPSEEK_V3,
    "MiniMax-M2": MINIMAX_M2,
}


@pytest.fixture(scope="module")
def kernels() -> Any:
    pytest.importorskip("triton")
    return load_script("benchmarks/kernels.py")


def test_every_layer_has_its_row(kernels):
    sizes = {name: (m.experts, m.topk, m.hidden, m.intermediate) for name, m in kernels.MODELS.items()}
    assert sizes == {name: (one.experts, one.top_k, one.hidden, one.intermediate) for name, one in LAYERS.items()}


def test_copies_exceed_the_cache_and_fit_into_memory_beside_a_layer_of_ours(kernels):
    for name, model in kernels.MODELS.items():
        token = model.copies * model.topk * model.pair_bytes("angle8")
        assert token > 2 * L2, f"{name}: one token's words of all copies are {token / 1e6:.0f} MB"
        bf16 = model.copies * model.experts * 3 * model.hidden * model.intermediate * 2
        ours = model.experts / 2 * model.pair_bytes("mask16")
        assert bf16 + ours < 0.9 * MEMORY, f"{name}: {bf16 / 2**30:.0f} and {ours / 2**30:.0f} GiB"


def test_an_interrupted_run_keeps_the_contenders_that_it_timed(kernels, monkeypatch, tmp_path):
    def measure(name, *_):
        times: dict[str, float] = {}
        for contender in ("vllm bf16", "puzzlemoe angle8"):
            times[contender] = 10.0
            yield [kernels.Point(name, "random", 1, 2.0, 2.0, {}, dict(times))]
        if name == "Qwen3-30B-A3B":
            raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "measure", measure)
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda: 3e12)
    monkeypatch.setattr(kernels, "machine", dict)
    out = tmp_path / "kernels.json"
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--models", "Mixtral-8x7B", "Qwen3-30B-A3B", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        kernels.main()
    points = json.loads(out.read_text())["points"]
    assert [(point["model"], len(point["microseconds"])) for point in points] == [
        ("Mixtral-8x7B", 2),
        ("Qwen3-30B-A3B", 2),
    ]
