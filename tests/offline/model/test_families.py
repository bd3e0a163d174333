"""Every family: what compress and unpack write computes what merging directly in float computes."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.models import VOCABULARY, build
from support.runs import compress_pairs, unpack
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from puzzlemoe_offline.calibration.text import load_calibration
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.families import FAMILIES
from puzzlemoe_offline.model.layer_experts import LayerExperts
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.model.tokenizer import tokenizer_of
from puzzlemoe_offline.words.paper_rule import merge_pair

NATIVE = [family for family in FAMILIES if family != "deepseek"]
TEXT = "It was the best of times, it was the worst of times. " * 120


def pack(source: Path, out: Path, **recipe) -> dict:
    """Compresses with 32 windows of 96 bytes; returns the report."""
    text = source / "text.txt"
    text.write_text(TEXT)
    calibration = load_calibration(str(text), tokenizer_of(source), 32, 96)
    return compress_pairs(source, out, calibration, **recipe)


def layerwise_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [n * T, vocabulary] through the layer-by-layer runner."""
    checkpoint = Checkpoint(folder)
    model = LayerwiseModel(checkpoint, "cpu")
    hidden = model.embed(tokens)
    for _, layer in model.layers(LayerExperts(checkpoint, "cpu")):
        hidden = layer(hidden)
    return model.logits(hidden.flatten(0, 1))


def merge_in_place(model: nn.Module, report: dict, tokens: torch.Tensor, tau: float) -> None:
    """Replaces the experts of a transformers model by their merged form; column norms from hooks of its own forward."""
    seen = {}
    layers = {record["layer"]: record for record in report["layers"] if "order" in record}
    for index in layers:
        experts = model.model.layers[index].mlp.experts
        experts.register_forward_pre_hook(lambda _, inputs, index=index: seen.update({index: inputs[:2]}))
    with torch.no_grad():
        model(tokens)
    for index, record in layers.items():
        experts, (hidden, ids) = model.model.layers[index].mlp.experts, seen[index]
        gate_up, down = experts.gate_up_proj.data, experts.down_proj.data
        inputs = [hidden[(ids == expert).any(dim=-1)] for expert in range(len(gate_up))]
        middles = []
        for x, weight in zip(inputs, gate_up, strict=True):
            gate, up = F.linear(x, weight).chunk(2, dim=-1)
            middles.append(F.silu(gate) * up)
        for first in range(0, record["merged"], 2):
            pair = record["order"][first : first + 2]
            for stack, seen_by in ((gate_up, inputs), (down, middles)):
                norms = [seen_by[expert].norm(dim=0) for expert in pair]
                merged = merge_pair(*(stack[expert].clone() for expert in pair), *norms, tau)
                for position, expert in enumerate(pair):
                    stack[expert] = merged.weight(position).bfloat16().float()


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("sparsity", [0.5, 0.25])
def test_packing_equals_merging_in_float(family, sparsity, tmp_path):
    source = build(family, tmp_path / "source")
    report = pack(source, tmp_path / "packed", sparsity=sparsity, tau=0.3)
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    calibration = load_calibration(
        str(source / "text.txt"), AutoTokenizer.from_pretrained(source, trust_remote_code=False), 32, 96
    ).tokens
    model, reconstructed = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, tmp_path / "unpacked")
    )
    tokens = torch.randint(0, VOCABULARY - 1, (2, 40))
    with torch.no_grad():
        dense = model(tokens).logits
        merge_in_place(model, report, calibration, tau=0.3)
        expected, actual = model(tokens).logits, reconstructed(tokens).logits
    assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert (dense - expected).norm() > 0.05 * dense.norm()
    assert torch.allclose(layerwise_logits(tmp_path / "packed", tokens), actual.flatten(0, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", NATIVE)
def test_the_layerwise_runner_computes_what_transformers_computes(family, tmp_path):
    source = build(family, tmp_path)
    tokens = torch.randint(0, VOCABULARY - 1, (3, 50))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(tokens).logits.flatten(0, 1)
    assert torch.allclose(layerwise_logits(source, tokens), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_model_in_bf16_keeps_its_rotary_frequencies_in_float32(family, tmp_path):
    # Only a CPU computes in float32; the meta device stands for a GPU here.
    model = LayerwiseModel(Checkpoint(build(family, tmp_path)), "meta").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.model.rotary_emb.buffers()} == {torch.float32}


def test_deepseek_moe_packs_and_unpacks_to_the_same_model(tmp_path):
    source = build("deepseek", tmp_path / "source")
    report = pack(source, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    tokens = torch.randint(0, VOCABULARY - 1, (2, 40))
    packed, unpacked = (layerwise_logits(tmp_path / name, tokens) for name in ("packed", "unpacked"))
    assert torch.equal(packed, unpacked)
    assert [("merged" in record) for record in report["layers"]] == [False, True, True]
    assert (tmp_path / "packed" / "configuration_deepseek.py").exists()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2"])
def test_fused_expert_tensors_pack_to_the_same_bytes(family, tmp_path):
    reports = []
    for fused in (False, True):
        source = build(family, tmp_path / f"source{fused}", fused=fused)
        reports.append(pack(source, tmp_path / f"packed{fused}"))
    apart, fused = (Checkpoint(tmp_path / f"packed{fused}") for fused in (False, True))
    assert apart.names == fused.names
    assert all(torch.equal(apart.tensor(name), fused.tensor(name)) for name in apart.names)
    assert [r.get("order") for r in reports[0]["layers"]] == [r.get("order") for r in reports[1]["layers"]]


@pytest.mark.parametrize("family", NATIVE)
def test_a_model_that_transformers_saved_again_is_read(family, tmp_path):
    source, saved = build(family, tmp_path / "source"), tmp_path / "saved"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(saved)
    ours, again = Checkpoint(source), Checkpoint(saved)
    again.check_complete()
    assert again.moe_layers == ours.moe_layers and again.experts == ours.experts
    assert all(
        torch.equal(one, other)
        for layer in ours.moe_layers
        for one, other in zip(ours.expert(layer, 5).matrices, again.expert(layer, 5).matrices, strict=True)
    )


def test_an_expert_that_saw_few_tokens_is_counted_and_merged_by_magnitude(tmp_path):
    source = build("qwen3_moe", tmp_path / "source", num_experts=64)
    report = pack(source, tmp_path / "packed")
    by_magnitude = tmp_path / "magnitude"
    few = {(r["layer"], expert) for r in report["layers"] for expert in r["few_tokens"]}
    counts = {(r["layer"], expert): n for r in report["layers"] for expert, n in enumerate(r["tokens"])}
    assert few == {key for key, count in counts.items() if count < 32}
    assert 0 < len(few) < len(counts)
    compress_pairs(source, by_magnitude)
    wanda, plain = Checkpoint(tmp_path / "packed"), Checkpoint(by_magnitude)
    same, differ = 0, 0
    for record in report["layers"]:
        for first in range(0, record["merged"], 2):
            words = [c.pair_words(record["layer"], first, "gate_proj") for c in (wanda, plain)]
            rare = any((record["layer"], expert) in few for expert in record["order"][first : first + 2])
            assert torch.equal(*words) or not rare
            same, differ = same + rare, differ + (not torch.equal(*words))
    assert same and differ


def test_the_report_is_json(tmp_path):
    report = pack(build("olmoe", tmp_path / "source"), tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "puzzlemoe_report.json").read_text()) == json.loads(json.dumps(report))
