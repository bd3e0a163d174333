"""What vLLM says to a damaged packed model, or to options that the plugin does not serve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from puzzlemoe_vllm.format.layout import parse_config
from puzzlemoe_vllm.format.shards import INDEX, index_with_records, save_shard, shard_metadata


@pytest.fixture
def model(models, tmp_path) -> Path:
    """A packed model to damage."""
    return shutil.copytree(models("mixtral").packed, tmp_path / "model")


def edit_shard(model: Path, change, *, whole: bool = False) -> Path:
    """Applies `change` to the tensors of the first shard; returns its path.

    whole: the index is written anew, as a tool would that writes such a folder on purpose.
    """
    shard = min(model.glob("*.safetensors"))
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    change(tensors)
    save_shard(tensors, shard, metadata)
    if whole:
        finish_index(model)
    return shard


def finish_index(model: Path) -> None:
    """The index of what the shards hold now."""
    weight_map = {name: shard.name for shard in sorted(model.glob("*.safetensors")) for name in load_file(shard)}
    config = parse_config(json.loads((model / "config.json").read_text())["quantization_config"])
    (model / INDEX).write_text(json.dumps(index_with_records(model, weight_map, 0, config)))


def edit_quantization(model: Path, *, whole: bool = False, **fields) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= fields
    path.write_text(json.dumps(config))
    if whole:
        finish_index(model)


def flip_a_bit(shard: Path) -> None:
    """In the last tensor's data."""
    with shard.open("r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([byte ^ 1]))


def test_truncated_shard(engine, model):
    shard = min(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    error = engine.refuses(model)
    assert f"{shard.name}: has" in error and "copy or download the file again" in error


# Neither vLLM's loader nor ours asks for these: they would be served as whatever memory held.
@pytest.mark.parametrize(
    "name", ["block_sparse_moe.gate", "self_attn.q_proj", "input_layernorm", "block_sparse_moe.experts.2.w1.puzzle"]
)
def test_missing_tensor(engine, model, name):
    name = f"model.layers.0.{name}" if name.endswith("puzzle") else f"model.layers.0.{name}.weight"
    edit_shard(model, lambda tensors: tensors.pop(name))
    error = engine.refuses(model)
    assert "00001-of" in error and f"({name} is missing)" in error and "copy or download the folder again" in error


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_missing_tensor_outside_layers(engine, model, name):
    shard = max(model.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors.pop(name)
    save_shard(tensors, shard, shard_metadata("mask16"))
    assert f"({name} is missing)" in engine.refuses(model)


def test_stray_tensor(engine, model):
    edit_shard(model, lambda tensors: tensors.update({"model.foo.weight": torch.zeros(1)}))
    assert "(model.foo.weight is not the model's)" in engine.refuses(model)


def test_tensor_of_another_dtype(engine, model):
    name = "model.layers.0.block_sparse_moe.gate.weight"
    edit_shard(model, lambda tensors: tensors.update({name: tensors[name].view(torch.int16)}))
    assert "its tensors are not those that" in engine.refuses(model)


def test_a_flipped_bit_is_found_when_asked_for(verifying_engine, model):
    flip_a_bit(min(model.glob("*.safetensors")))
    error = verifying_engine.refuses(model)
    assert "model-00001-of-00003.safetensors: is damaged" in error and "SHA-256" in error


def test_a_sound_model_is_served_when_digests_are_asked_for(verifying_engine, engine, models):
    model = models("mixtral").packed
    assert verifying_engine.generate(model, enforce_eager=True) == engine.generate(model, enforce_eager=True)


def test_missing_dense_expert(engine, models, tmp_path):
    model = shutil.copytree(models("mixtral", sparsity="0.25").packed, tmp_path / "model")
    edit_shard(model, lambda tensors: tensors.pop("model.layers.0.block_sparse_moe.experts.5.w2.weight"), whole=True)
    assert "no weight of expert 5, w2, which layer 0" in engine.refuses(model)


@pytest.mark.parametrize(("expert", "value"), [(5, float("nan")), (6, float("inf"))])
def test_dense_expert_that_is_not_finite(engine, models, tmp_path, expert, value):
    model = shutil.copytree(models("mixtral", sparsity="0.25").packed, tmp_path / "model")
    name = f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"
    edit_shard(model, lambda tensors: tensors[name][3].fill_(value), whole=True)
    assert f"experts.{expert}: its weights (w2_weight) are NaN" in engine.refuses(model)


def test_steps_that_are_not_finite(engine, models, tmp_path):
    model = shutil.copytree(models("mixtral", code="angle8").packed, tmp_path / "model")
    name = "model.layers.0.block_sparse_moe.experts.4.w3.puzzle_grid"
    edit_shard(model, lambda tensors: tensors[name][3].fill_(float("nan")), whole=True)
    assert "experts.4: its steps (w13_puzzle_grid) are NaN" in engine.refuses(model)


def test_words_of_another_dtype(engine, model):
    name = "model.layers.0.block_sparse_moe.experts.0.w3.puzzle"
    edit_shard(model, lambda tensors: tensors.update({name: tensors[name].int()}), whole=True)
    assert f"{name} is of dtype I32, expected I16" in engine.refuses(model)


def test_words_of_another_shape(engine, model):
    name = "model.layers.0.block_sparse_moe.experts.0.w2.puzzle"
    edit_shard(model, lambda tensors: tensors.update({name: tensors[name][:, :-16].contiguous()}), whole=True)
    assert "does not fit the layer's experts" in engine.refuses(model)


def test_words_of_another_code(engine, model):
    edit_quantization(model, code="angle16")
    assert "holds mask16 words, config.json says angle16" in engine.refuses(model)


@pytest.mark.parametrize(
    ("merged", "message"),
    [
        ({"0": 6, "1": 8}, "experts.6.w1.puzzle, which layer 0 of config.json's quantization_config does not name"),
        ({"0": 8}, "holds model.layers.1.block_sparse_moe.experts.0.w1.puzzle, which layer 1"),
        ({"0": 8, "1": 8, "99": 8}, "merges 8 experts of layer 99"),
        ({}, "both merged_experts and clusters are empty"),
    ],
)
def test_pairs_that_are_not_the_configs(engine, model, merged, message):
    edit_quantization(model, merged_experts=merged)
    assert message in engine.refuses(model)


@pytest.mark.parametrize("whole", [False, True])
def test_clusters_that_are_not_the_configs(engine, models, tmp_path, whole):
    packed = models("mixtral", clusters=3).packed
    clusters = json.loads((packed / "config.json").read_text())["quantization_config"]["clusters"]
    model = shutil.copytree(packed, tmp_path / "model")
    edit_quantization(model, clusters={"0": clusters["0"]}, whole=whole)
    assert "layer 1 of config.json's quantization_config does not name" in engine.refuses(model)
    edit_quantization(model, clusters={})
    assert "both merged_experts and clusters are empty" in engine.refuses(model)


def test_other_members_of_a_cluster(engine, models, tmp_path):
    model = shutil.copytree(models("mixtral", clusters=3).packed, tmp_path / "model")
    clusters = json.loads((model / "config.json").read_text())["quantization_config"]["clusters"]
    centres = sorted(set(clusters["0"]))
    member = next(expert for expert in range(8) if expert not in centres)
    clusters["0"][member] = next(centre for centre in centres if centre != clusters["0"][member])
    edit_quantization(model, clusters=clusters)
    assert "quantization_config is not the one that the model was written with" in engine.refuses(model)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_other_weights_in_the_folder(engine, model, name):
    save_file({"lm_head.weight": torch.zeros(1)}, model / name)
    error = engine.refuses(model)
    assert f"{name}: is none of the files" in error and "move it out of the folder" in error


def test_a_folder_without_an_index(engine, model):
    (model / INDEX).unlink()
    assert f"{INDEX}: is missing" in engine.refuses(model)


def test_a_folder_without_digests(engine, model):
    index = json.loads((model / INDEX).read_text())
    del index["metadata"]["shards"]
    (model / INDEX).write_text(json.dumps(index))
    assert "has no digests of the shards" in engine.refuses(model)


def test_dummy_weights_need_no_folder_of_weights(engine, model):
    for path in [*model.glob("*.safetensors"), model / INDEX]:
        path.unlink()
    assert engine.generate(model, enforce_eager=True, load_format="dummy")


def test_routing_that_is_overridden_is_warned_of(engine, models):
    model = models("mixtral").packed
    assert engine.generate(model, enforce_eager=True, hf_overrides={"num_experts_per_tok": 1})
    assert "num_experts_per_tok is 1, but the model was compressed with 2" in engine.log.read_text()


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
