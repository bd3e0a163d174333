"""Weights that were lost and loaded again: the same tensors at the same addresses, so the same tokens.

The sleep modes need a GPU; contract.py has what vLLM's releases do to a layer when they reload it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.engine import Engine, EngineError

from puzzlemoe_vllm.format.codes import get_code

MODELS = {
    "16-bit words and dense experts": {"family": "mixtral", "sparsity": "0.25"},
    "8-bit words": {"family": "qwen3_moe", "code": "angle8"},
    "6-bit words": {"family": "deepseek_v2", "code": "mask6"},
    "tiles": {"family": "qwen3_moe", "code": "trellis6"},
    "clusters": {"family": "mixtral", "clusters": 3},
}

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM's CPU build has no sleep mode")


@pytest.mark.parametrize("kind", MODELS)
def test_reload(engine, models, kind):
    before, after, changed = engine.reload(models(**MODELS[kind]).packed, enforce_eager=True)
    assert before == after and not changed


def test_weights_of_another_model(engine, models):
    model, other = (models("mixtral", code="angle8", intermediate_size=128, seed=seed).packed for seed in (0, 1))
    before, after, changed = engine.reload(model, other, enforce_eager=True)
    assert before == engine.generate(model, enforce_eager=True)
    assert after == engine.generate(other, enforce_eager=True) != before
    assert any("puzzle" in name for name in changed)


def test_weights_of_another_layout_are_refused(engine, models):
    model, other = (models("mixtral", sparsity=sparsity).packed for sparsity in ("0.5", "0.25"))
    with pytest.raises(EngineError, match=r"config\.json"):
        engine.reload(model, other, enforce_eager=True)


@pytest.fixture
def sleeping_engine(tmp_path) -> Iterator[Engine]:
    """A process for one model: vLLM lets one model in a process sleep."""
    engine = Engine(tmp_path / "log")
    yield engine
    engine.stop()


# Compiled, so that CUDA graphs hold addresses.
@on_a_gpu
@pytest.mark.parametrize(("kind", "level"), [("8-bit words", 1), *((kind, 2) for kind in MODELS)])
def test_sleep(sleeping_engine, models, kind, level):
    before, after, changed = sleeping_engine.reload(models(**MODELS[kind]).packed, sleep=level)
    assert before == after and not changed


@on_a_gpu
def test_the_word_table_is_not_in_a_models_memory_pool():
    code, pool = get_code("angle6"), torch.cuda.MemPool()
    code._word_tables.clear()
    with torch.cuda.use_mem_pool(pool):
        code.word_table(torch.device("cuda", 0))
    assert not pool.snapshot()
