"""The layers that benchmarks/kernels.py measures have the sizes that kernels are tested at, and fit into a GPU."""

from __future__ import annotations

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
