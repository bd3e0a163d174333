"""What vLLM says to a damaged packed model, or to options that the plugin does not serve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture
def model(models, tmp_path) -> Path:
    """A packed model to damage."""
    return shutil.copytree(models("mixtral").packed, tmp_path / "model")


def edit_shard(model: Path, change) -> Path:
    """Applies `change` to the tensors of the first shard; returns its path."""
    shard = min(model.glob("*.safetensors"))
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    return shard


def edit_quantization(model: Path, **fields) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= fields
    path.write_text(json.dumps(config))


def test_truncated_shard(engine, model):
    shard = min(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert "SafetensorError" in engine.refuses(model)


def test_missing_words(engine, model):
    edit_shard(model, lambda tensors: tensors.pop("model.layers.0.block_sparse_moe.experts.2.w1.puzzle"))
    error = engine.refuses(model)
    assert "model.layers.0" in error and "w13_puzzle w1 of expert 2" in error and "missing" in error


def test_missing_dense_expert(engine, models, tmp_path):
    model = shutil.copytree(models("mixtral", sparsity="0.25").packed, tmp_path / "model")
    edit_shard(model, lambda tensors: tensors.pop("model.layers.0.block_sparse_moe.experts.5.w2.weight"))
    assert "w2_weight w2 of expert 5" in engine.refuses(model)


def test_words_of_another_dtype(engine, model):
    name = "model.layers.0.block_sparse_moe.experts.0.w3.puzzle"
    edit_shard(model, lambda tensors: tensors.update({name: tensors[name].int()}))
    error = engine.refuses(model)
    assert "of expert 0" in error and "torch.int32, expected torch.int16" in error


def test_words_of_another_shape(engine, model):
    name = "model.layers.0.block_sparse_moe.experts.0.w2.puzzle"
    edit_shard(model, lambda tensors: tensors.update({name: tensors[name][:, :-16].contiguous()}))
    assert "does not fit" in engine.refuses(model)


def test_words_of_a_pair_that_the_config_does_not_name(engine, model):
    edit_quantization(model, merged_experts={"0": 6, "1": 8})
    error = engine.refuses(model)
    assert "of expert 6" in error and "config.json names no such pair" in error


def test_more_pairs_than_experts(engine, model):
    edit_quantization(model, merged_experts={"0": 10, "1": 8})
    assert "merges 10 experts of layer 0" in engine.refuses(model)


def test_foreign_format_version(engine, model):
    edit_quantization(model, format_version=99)
    error = engine.refuses(model)
    assert "format_version is 99" in error and "upgrade puzzlemoe-vllm" in error


def test_unknown_code(engine, model):
    edit_quantization(model, code="mask3")
    assert "code 'mask3' is not known" in engine.refuses(model)


def test_float16(engine, models):
    error = engine.refuses(models("mixtral").packed, dtype="float16")
    assert "torch.float16 is not supported" in error and "bfloat16" in error


def test_lora_on_experts(engine, models):
    model, options = models("mixtral").packed, {"enable_lora": True, "max_lora_rank": 8}
    for targets in (None, ["q_proj", "experts"]):
        error = engine.refuses(model, lora_target_modules=targets, **options)
        assert "does not serve LoRA adapters of experts" in error and "--lora-target-modules q_proj" in error
    adapted = engine.generate(model, enforce_eager=True, lora_target_modules=["q_proj"], **options)
    assert adapted == engine.generate(model, enforce_eager=True)


def test_quantization_flag_on_an_unpacked_model(engine, models):
    error = engine.refuses(models("mixtral").unpacked, quantization="puzzlemoe")
    assert "Cannot find the config file for puzzlemoe" in error


def test_quantization_flag_of_another_method(engine, models):
    assert "does not match" in engine.refuses(models("mixtral").packed, quantization="fp8")
