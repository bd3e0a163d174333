"""Every family: what compress and unpack write computes what merging directly in float computes."""

import json
import random
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support.model_configs import VOCABULARY
from support.models import FUSED, build
from support.runs import compress_pairs, unpack
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from puzzlemoe_offline.calibration.text import load_calibration
from puzzlemoe_offline.cli.main import app
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.families import FAMILIES
from puzzlemoe_offline.model.layer_experts import LayerExperts
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.model.tokenizer import tokenizer_of
from puzzlemoe_offline.model.weight_files import CheckpointError
from puzzlemoe_offline.score.perplexity import perplexity
from puzzlemoe_offline.words.paper_rule import merge_pair

REMOTE = [name for name, family in FAMILIES.items() if family.remote_config]
NATIVE = [name for name in FAMILIES if name not in REMOTE]
BIASED = [name for name, family in FAMILIES.items() if len(family.router) > 1 and name in NATIVE]
ONE_BY_ONE = [name for name in NATIVE if name not in FUSED]
TEXT = "It was the best of times, it was the worst of times. " * 120
VARIED = "".join(random.Random(0).choices(string.printable, k=8000))
"""Every expert gets tokens."""


def pack(source: Path, out: Path, content: str = TEXT, **recipe) -> dict:
    """Compresses with 32 windows of 96 bytes; returns the report."""
    text = source / "text.txt"
    text.write_text(content)
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


def experts_of(model: nn.Module, layer: int) -> nn.Module:
    """The experts of a layer of transformers' class."""
    (found,) = [module for name, module in model.model.layers[layer].named_modules() if name.endswith(".experts")]
    return found


def merge_in_place(model: nn.Module, report: dict, tokens: torch.Tensor, tau: float) -> None:
    """Replaces the experts of a transformers model by their merged form; column norms from hooks of its own forward."""
    seen = {}
    layers = {record["layer"]: record for record in report["layers"] if "order" in record}
    for index in layers:
        experts = experts_of(model, index)
        experts.register_forward_pre_hook(lambda _, inputs, index=index: seen.update({index: inputs[:2]}))
    with torch.no_grad():
        model(tokens)
    for index, record in layers.items():
        experts, (hidden, ids) = experts_of(model, index), seen[index]
        gate_up, down = experts.gate_up_proj.data, experts.down_proj.data
        inputs = [hidden[(ids == expert).any(dim=-1)] for expert in range(len(gate_up))]
        middles = []
        for x, weight in zip(inputs, gate_up, strict=True):
            gate, up = F.linear(x, weight).chunk(2, dim=-1)
            middles.append(F.silu(gate) * up)
        for first in range(0, record["merged"], 2):
            pair = record["order"][first : first + 2]
            for stack, seen_by in ((gate_up, inputs), (down, middles)):
                # A pair of which one expert saw few tokens is merged by magnitude.
                few = not set(pair).isdisjoint(record["few_tokens"])
                norms = [torch.ones(stack.shape[2]) if few else seen_by[expert].norm(dim=0) for expert in pair]
                merged = merge_pair(*(stack[expert].clone() for expert in pair), *norms, tau)
                for position, expert in enumerate(pair):
                    stack[expert] = merged.weight(position).bfloat16().float()


@pytest.mark.parametrize(("family", "sparsity"), [*((family, 0.5) for family in NATIVE), ("mixtral", 0.25)])
def test_packing_equals_merging_in_float(family, sparsity, tmp_path):
    source = build(family, tmp_path / "source")
    report = pack(source, tmp_path / "packed", VARIED, sparsity=sparsity, tau=0.3)
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
    held = [(name, parameter.dtype) for name, parameter in model.named_parameters() if ".experts." not in name]
    assert {dtype for name, dtype in held if "gate." not in name} == {torch.bfloat16}
    rotary = getattr(model.model, FAMILIES[family].rotary)
    assert {buffer.dtype for buffer in rotary.buffers()} == {torch.float32}


@pytest.mark.parametrize("family", REMOTE)
def test_without_a_class_in_transformers_packs_and_unpacks_to_the_same_model(family, tmp_path):
    source = build(family, tmp_path / "source")
    report = pack(source, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    tokens = torch.randint(0, VOCABULARY - 1, (2, 40))
    packed, unpacked = (layerwise_logits(tmp_path / name, tokens) for name in ("packed", "unpacked"))
    assert torch.equal(packed, unpacked)
    assert [("merged" in record) for record in report["layers"]] == [False, True, True]
    assert (tmp_path / "packed" / "configuration_deepseek.py").exists()


def full_forward(folder: Path, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """transformers' own: logits [n, T, vocabulary], and how many tokens chose each expert, by layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = {}
    for index, layer in enumerate(model.model.layers):
        if any(name.endswith(".experts") for name, _ in layer.named_modules()):
            experts = experts_of(model, index)
            experts.register_forward_pre_hook(lambda _, inputs, index=index: seen.update({index: inputs[1]}))
    with torch.no_grad():
        logits = model(tokens).logits
    count = Checkpoint(folder).experts
    return logits, {index: torch.bincount(ids.flatten(), minlength=count) for index, ids in seen.items()}


def with_large_biases(source: Path) -> Path:
    """The same checkpoint, with random and large float32 biases in its routers, and in no number that bf16 has."""
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            tensors[name] = 3 * torch.randn(tensors[name].shape)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


@pytest.mark.parametrize("family", BIASED)
def test_a_routers_bias_decides_calibration_and_perplexity_and_follows_its_experts(family, tmp_path):
    source = with_large_biases(build(family, tmp_path / "source"))
    plain = build(family, tmp_path / "plain")
    report = pack(source, tmp_path / "packed")
    tokens = load_calibration(str(source / "text.txt"), tokenizer_of(source), 32, 96).tokens
    logits, counts = full_forward(source, tokens)
    assert {r["layer"]: r["tokens"] for r in report["layers"] if "tokens" in r} == {
        layer: count.tolist() for layer, count in counts.items()
    }
    assert any(count.tolist() != full_forward(plain, tokens)[1][layer].tolist() for layer, count in counts.items())
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp().item()
    assert perplexity(LayerwiseModel(Checkpoint(source), "cpu"), tokens).perplexity == pytest.approx(expected, rel=1e-4)
    # The packed model's router chooses the same experts by their new ids.
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    before, after = Checkpoint(source), Checkpoint(tmp_path / "unpacked")
    for record in report["layers"]:
        if "order" in record:
            for name in FAMILIES[family].router:
                old, new = (c.tensor(f"{c.block(record['layer'])}.{name}") for c in (before, after))
                assert new.dtype == old.dtype
                axis = 0 if len(old) == before.experts else 1
                assert torch.equal(new, old.index_select(axis, torch.tensor(record["order"])))


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


@pytest.mark.parametrize("family", ONE_BY_ONE)
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


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_row_through_the_command(family, tmp_path):
    """compress, inspect, unpack, inspect, on a tiny model as the hub has it."""
    source, packed, unpacked = build(family, tmp_path / "source"), tmp_path / "packed", tmp_path / "unpacked"
    (tmp_path / "text").write_text(VARIED)
    calibration = ["--calibration", str(tmp_path / "text"), "--samples", "4", "--sequence-length", "64"]
    facts = {}
    for command in (
        ["compress", source, packed, *calibration, "--code", "angle8", "--device", "cpu"],
        ["inspect", packed, "--json"],
        ["unpack", packed, unpacked],
        ["inspect", unpacked, "--json"],
    ):
        done = CliRunner().invoke(app, list(map(str, command)))
        assert done.exit_code == 0, (command, done.output)
        if "--json" in command:
            facts[command[1]] = json.loads(done.stdout)
    before, after = Checkpoint(source), Checkpoint(unpacked)
    assert set(after.names) >= set(before.outside) | set(before.copied)
    for name in before.copied:
        assert torch.equal(before.tensor(name), after.tensor(name)) and after.shape(name) == before.shape(name)
    for layer in range(before.layers):
        for name in before.layer(layer).plain:
            assert before.tensor(name).dtype == after.tensor(name).dtype, name
    report = json.loads((packed / "puzzlemoe_report.json").read_text())
    assert report["bytes"]["copied"] == before.copied_bytes
    assert facts[packed]["copied"] == sorted(before.copied_bytes)
    sizes, row = facts[packed]["bytes"], before.family
    assert sizes["routers"] and sizes["attention"] and bool(row.shared) == ("shared experts" in sizes)
    # What it names is there: each of these is nothing more than a string in the table.
    names = [name for layer in range(before.layers) for name in before.layer(layer).plain]
    for end in (*row.float32, *row.router):
        assert any(name.endswith(f".{end}") for name in names), end
    assert set(row.copied.values()) <= set(before.copied_bytes)
    assert facts[unpacked]["total_bytes"] == sum(map(after.nbytes, after.names))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"module": "moe"}, "moe"),
        ({"norm": "last_norm"}, "last_norm"),
        ({"rotary": "rope"}, "rope"),
        ({"shared": "shared_mlp"}, "shared_mlp"),
        ({"router": {"gate.weight": "gate.weight"}}, "mlp.gate.e_score_correction_bias"),
        ({"router": {"gate.weight": "router.weight"}}, "mlp.gate.e_score_correction_bias"),
    ],
)
def test_a_row_that_names_what_its_model_does_not_have_is_an_error_at_first_use(changes, named, tmp_path, monkeypatch):
    source = build("glm4_moe", tmp_path)
    monkeypatch.setitem(FAMILIES, "glm4_moe", replace(FAMILIES["glm4_moe"], **changes))
    with pytest.raises(CheckpointError, match=f"table of families differ in {named}: install another release"):
        LayerwiseModel(Checkpoint(source), "cpu")


def test_a_row_that_names_what_is_not_on_the_disk_is_an_error_at_first_use(tmp_path, monkeypatch):
    source = build("glm4_moe", tmp_path)
    router = {"gate.weight": "gate.weight", "gate.bias": "gate.e_score_correction_bias"}
    monkeypatch.setitem(FAMILIES, "glm4_moe", replace(FAMILIES["glm4_moe"], router=router))
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\.mlp\.gate\.bias is missing"):
        LayerwiseModel(Checkpoint(source), "cpu")
