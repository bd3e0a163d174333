"""Every family: vLLM on the packed model generates what vLLM without the plugin generates on the unpacked one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from support import models as tiny_models
from support.comparison import assert_same_generation
from support.engine import Engine, Step
from support.model_configs import CONFIGS
from support.packed_models import Models
from support.runs import compress_pairs, unpack

from puzzlemoe_offline.model import families
from puzzlemoe_vllm.format.shards import save_shard

FAMILIES = list(CONFIGS)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def options(family: str) -> dict[str, bool]:
    """vLLM's, to serve a family: whether it reads config.json with code of the checkpoint, and whether it leaves out a
    vision tower, whose processor would want a tokenizer."""
    return {
        "trust_remote_code": families.FAMILIES[family].remote_config,
        "language_model_only": "vision_config" in CONFIGS[family],
    }


@pytest.fixture(scope="module")
def expected(family: str, engine: Engine, models: Callable[..., Models]) -> list[list[Step]]:
    """The unpacked model's continuations."""
    return engine.generate(models(family).unpacked, enforce_eager=True, **options(family))


def test_packed_model_generates_what_the_unpacked_one_does(family, engine, models, expected):
    found = engine.generate(models(family).packed, enforce_eager=True, **options(family))
    assert_same_generation(expected, found)


# Compiling takes ten seconds a model and more; these have shared experts and dense layers.  (A compiled DeepSeek-V2
# departs from its eager run without the plugin, too.)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek"], indirect=True)
def test_compiled(family, compiling_engine, models, expected):
    found = compiling_engine.generate(models(family).packed, enforce_eager=False, **options(family))
    assert_same_generation(expected, found)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "glm4_moe", "lfm2_moe"], indirect=True)
def test_a_quarter_of_the_memory_saved(family, engine, models):
    both = models(family, sparsity="0.25")
    expected = engine.generate(both.unpacked, enforce_eager=True, **options(family))
    assert_same_generation(expected, engine.generate(both.packed, enforce_eager=True, **options(family)))


# Projections that vLLM fuses: of attention, of MLA where a block is cut, of linear attention under names that it maps.
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen3_moe", {"head_dim": 64}),
        ("deepseek_v3", {"q_lora_rank": 128, "kv_lora_rank": 128}),
        ("qwen3_5_moe", {}),
    ],
    indirect=["family"],
)
def test_linear_layers_in_fp8(family, sizes, engine, models):
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("only kernels of vLLM's CPU build leave tokens in bf16")
    both = models(family, fp8="deepseek", **sizes)
    expected = engine.generate(both.unpacked, enforce_eager=True, **options(family))
    assert_same_generation(expected, engine.generate(both.packed, enforce_eager=True, **options(family)))


@pytest.mark.parametrize("code", ["angle16", "angle8", "angle6", "mask6", "trellis8", "trellis3"])
def test_every_code(code, engine, models):
    both = models("qwen3_moe", sparsity="0.25", code=code)
    expected = engine.generate(both.unpacked, enforce_eager=True)
    assert_same_generation(expected, engine.generate(both.packed, enforce_eager=True))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"], indirect=True)
def test_clusters(family, engine, models):
    both = models(family, clusters=3)
    expected = engine.generate(both.unpacked, enforce_eager=True)
    assert_same_generation(expected, engine.generate(both.packed, enforce_eager=True))


def test_clusters_compiled(compiling_engine, engine, models):
    both = models("mixtral", clusters=3)
    expected = engine.generate(both.unpacked, enforce_eager=True)
    assert_same_generation(expected, compiling_engine.generate(both.packed, enforce_eager=False))


def test_source_with_fused_expert_tensors(engine, models):
    both = models("qwen3_moe", fused=True)
    expected = engine.generate(both.unpacked, enforce_eager=True)
    assert_same_generation(expected, engine.generate(both.packed, enforce_eager=True))


def test_exchanged_partners_are_noticed(engine, models, tmp_path):
    """The comparison itself: one pair of one layer with its two experts exchanged."""
    both = models("mixtral")
    damaged = shutil.copytree(both.packed, tmp_path / "damaged")
    exchange_pair(damaged, "model.layers.1.block_sparse_moe.experts.2.")
    expected = engine.generate(both.unpacked, enforce_eager=True)
    found = engine.generate(damaged, enforce_eager=True)
    with pytest.raises(AssertionError, match="became"):
        assert_same_generation(expected, found)


def exchange_pair(folder: Path, prefix: str) -> None:
    """Exchanges sign and mask bits of the two positions in the words below `prefix`."""
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        with safe_open(shard, "pt") as file:
            metadata = file.metadata()
        for name in tensors:
            if name.startswith(prefix) and name.endswith(".puzzle"):
                word = tensors[name].int() & 0xFFFF
                tensors[name] = ((word & 0x0FFF) | (word & 0xA000) >> 1 | (word & 0x5000) << 1).short()
        save_shard(tensors, shard, metadata)


def test_layers_whose_experts_all_stay_dense(engine, tmp_path):
    """A dead expert suits no partner: layer 0 has no pairs at all, layer 1 has one."""
    source = tiny_models.build("mixtral", tmp_path / "source", num_local_experts=2)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if "layers.0.block_sparse_moe.experts.1." in name]:
        tensors[name].zero_()
    save_shard(tensors, source / "model.safetensors", {"format": "pt"})
    report = compress_pairs(source, tmp_path / "packed", code="angle8", pairing="search")
    assert [layer["merged"] for layer in report["layers"]] == [0, 2]
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    expected = engine.generate(tmp_path / "unpacked", enforce_eager=True)
    assert_same_generation(expected, engine.generate(tmp_path / "packed", enforce_eager=True))
