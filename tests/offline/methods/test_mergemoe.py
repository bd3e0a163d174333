"""MergeMoE: which experts cluster, what they become, and that what is written, unpacked and computed is one model."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.model_configs import VOCABULARY
from support.models import build
from support.runs import job_of, run_method, sentences, unpack
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from puzzlemoe_offline.cli.main import app
from puzzlemoe_offline.cli.options import OptionError
from puzzlemoe_offline.methods import mergemoe
from puzzlemoe_offline.methods.base import MethodError
from puzzlemoe_offline.methods.mergemoe import Cluster, LayerMerger, MergeMoe, cluster
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_offline.model.families import FAMILIES
from puzzlemoe_offline.model.inspection import inspect
from puzzlemoe_offline.model.layer_experts import LayerExperts
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.recipe import ClusterRecipe
from puzzlemoe_offline.run.plan import make_plan
from puzzlemoe_vllm.format.layout import LayoutError

HIDDEN, INTERMEDIATE = 24, 16


def expert(seed: int) -> Expert:
    generator = torch.Generator().manual_seed(seed)

    def weight(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    return Expert(weight(INTERMEDIATE, HIDDEN), weight(INTERMEDIATE, HIDDEN), weight(HIDDEN, INTERMEDIATE))


def near(other: Expert, seed: int) -> Expert:
    """Gate and up close to another's, a down projection of its own."""
    noise = expert(seed)
    return Expert(other.gate + 0.1 * noise.gate, other.up + 0.1 * noise.up, noise.down)


def hidden(one: Expert, x: Tensor) -> Tensor:
    return F.silu(F.linear(x, one.gate.double())) * F.linear(x, one.up.double())


def test_the_most_used_are_centres_and_the_others_join_the_nearest():
    first, second, third = (expert(seed) for seed in range(3))
    experts = [near(second, 3), first, near(first, 4), second, near(second, 5), third]
    tokens = torch.tensor([7, 50, 3, 40, 7, 7])
    assert cluster(experts, tokens, 2)[:5] == [3, 1, 1, 3, 3]
    # Of equally used experts the first is a centre.
    assert cluster(experts, tokens, 3)[:5] == [0, 1, 1, 3, 3]
    assert cluster(experts, tokens, 1) == [1] * 6


def test_the_down_projection_is_the_least_squares_solution(monkeypatch):
    """Against T1 = Q P^+ written out, in float64."""
    monkeypatch.setattr(mergemoe, "DAMPING", 1e-7)
    members, tokens = {2: expert(0), 5: expert(1), 6: expert(2)}, torch.tensor([0, 0, 60, 0, 0, 30, 10])
    merged = Cluster(members, tokens)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for size in (100, 37):
        inputs = torch.randn(size, HIDDEN, generator=generator)
        ids = torch.randint(0, 7, (size, 2), generator=generator)
        merged.observe(inputs, ids)
        seen.append(inputs[((ids == 2) | (ids == 5) | (ids == 6)).any(dim=1)])
    x = torch.cat(seen).double()
    assert len(x) < 137
    shares = {2: 0.6, 5: 0.3, 6: 0.1}
    result = merged.merge()
    mean_gate = sum(share * members[number].gate.float() for number, share in shares.items())
    torch.testing.assert_close(result.gate, mean_gate.bfloat16())
    p = hidden(result, x).T
    q = torch.cat([hidden(member, x).T for member in members.values()])
    d = torch.cat([shares[number] * member.down.double() for number, member in members.items()], dim=1)
    best = d @ (q @ torch.linalg.pinv(p))
    torch.testing.assert_close(result.down, best.bfloat16(), rtol=0.02, atol=2e-3)

    def loss(down: Tensor) -> float:
        return float((d @ q - down @ p).square().sum())

    mean = sum(share * members[number].down.double() for number, share in shares.items())
    assert loss(result.down.double()) < 1.001 * loss(best)
    assert loss(best) < 0.8 * loss(mean)


def test_damping_costs_little():
    members, inputs = {0: expert(0), 1: expert(1)}, torch.randn(400, HIDDEN, generator=torch.Generator().manual_seed(0))
    merged = Cluster(members, torch.tensor([3, 1]))
    merged.observe(inputs, torch.zeros(400, 1, dtype=torch.int64))
    x = inputs.double()
    result = merged.merge()
    target = 0.75 * hidden(members[0], x) @ members[0].down.double().T
    target += 0.25 * hidden(members[1], x) @ members[1].down.double().T
    p = hidden(result, x)
    best = torch.linalg.lstsq(p, target).solution
    assert (target - p @ result.down.double().T).norm() < 1.01 * (target - p @ best).norm()


def test_without_tokens_every_projection_is_the_mean():
    members = {0: expert(0), 1: expert(1)}
    merged = Cluster(members, torch.zeros(2)).merge()
    for name in ("gate", "up", "down"):
        mean = (getattr(members[0], name).float() + getattr(members[1], name).float()) / 2
        torch.testing.assert_close(getattr(merged, name), mean.bfloat16())


def test_an_expert_alone_in_its_cluster_stays_as_it_is():
    experts = [expert(seed) for seed in range(4)]
    merger = LayerMerger(lambda number: experts[number], torch.tensor([9, 8, 7, 1]), 3)
    merger.observe(torch.randn(50, HIDDEN), torch.randint(0, 4, (50, 2)))
    layer = merger.finish()
    assert sorted(layer.merged) == [0, 1, 2]
    (joined,) = (centre for number, centre in enumerate(layer.centres) if number == 3)
    for number in {0, 1, 2} - {joined}:
        assert layer.expert(number) is experts[number]
    assert layer.expert(3) is layer.expert(joined) is not experts[joined]


def pack(source: Path, out: Path, clusters: int) -> dict:
    """Compresses with 16 windows of 96 bytes; returns the report."""
    calibration, method = sentences(source, 16, 96), MergeMoe(ClusterRecipe(clusters=clusters))
    report = run_method(source, out, method, calibration)
    assert report["bytes"]["experts_after"] == make_plan(job_of(source, method, calibration)).sizes.experts_after
    return report


def logits(folder: Path, tokens: Tensor) -> Tensor:
    """[n * T, vocabulary] through the layer-by-layer runner."""
    checkpoint = Checkpoint(folder)
    model = LayerwiseModel(checkpoint, "cpu")
    states = model.embed(tokens)
    for _, layer in model.layers(LayerExperts(checkpoint, "cpu")):
        states = layer(states)
    return model.logits(states.flatten(0, 1))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "deepseek", "glm4_moe", "qwen3_5_moe", "granitemoe"])
def test_written_unpacked_and_computed_models_agree(family, tmp_path):
    source, packed, unpacked = build(family, tmp_path / "source"), tmp_path / "packed", tmp_path / "unpacked"
    report = pack(source, packed, 3)
    unpack(packed, unpacked)
    before, after = inspect(Checkpoint(source)), inspect(Checkpoint(packed))
    expert_bytes = after["bytes"].pop("experts, in clusters")
    assert expert_bytes == before["bytes"].pop("experts, dense") * 3 / 8 == report["bytes"]["experts_after"]
    assert after["bytes"] == before["bytes"]
    assert after["clusters"] == 3 * after["moe_layers"] and after["pairs"] == 0 and after["code"] is None
    row = FAMILIES[family]
    routers = [
        name for name in Checkpoint(source).names if name.endswith(tuple(f"{row.block}.{r}" for r in row.router))
    ]
    assert routers and all(torch.equal(Checkpoint(source).tensor(n), Checkpoint(packed).tensor(n)) for n in routers)
    tokens = torch.randint(0, VOCABULARY - 1, (2, 40), generator=torch.Generator().manual_seed(0))
    found = logits(packed, tokens)
    assert torch.equal(found, logits(unpacked, tokens))
    dense = logits(source, tokens)
    assert (found - dense).norm() > 0.05 * dense.norm()
    if not row.remote_config:
        model = AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(found, model(tokens).logits.flatten(0, 1), rtol=1e-3, atol=1e-3)


def test_fewer_experts_lose_more(tmp_path):
    source = build("qwen3_moe", tmp_path / "source")
    losses = [sum(layer["output_error"] for layer in pack(source, tmp_path / f"{m}", m)["layers"]) for m in (7, 4, 1)]
    assert 0 < losses[0] < losses[1] < losses[2]


def test_the_whole_command(example, tmp_path):
    out = tmp_path / "out"
    done = run("compress", example / "model", out, "--method", "mergemoe", "--clusters", "6", *calibration(example))
    assert done.exit_code == 0, done.output
    assert "8 in 6" in done.output
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["provenance"]["recipe"] == {"method": "mergemoe", "clusters": 6}
    assert [len(set(centres)) for centres in config["clusters"].values()] == [6] * 4
    card = (out / "README.md").read_text()
    assert json.loads((out / "puzzlemoe_report.json").read_text())["bytes_per_token"] is None
    assert "in clusters with MergeMoE" in card and "tau" not in card
    names = {name for shard in out.glob("*.safetensors") for name in load_file(shard)}
    assert len([name for name in names if ".experts." in name]) == 4 * 6 * 3
    assert "24 clusters" in run("inspect", out).output


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def calibration(example: Path) -> list[str]:
    return ["--calibration", str(example / "calibration.txt"), "--samples", "8", "--sequence-length", "128"]


@pytest.mark.parametrize(("clusters", "more"), [(0, []), (8, []), (8, ["--dry-run"])])
def test_a_number_of_clusters_that_cannot_be(clusters, more, example, tmp_path):
    command = ["compress", example / "model", tmp_path / "out", "--method", "mergemoe", "--clusters", clusters, *more]
    with pytest.raises(MethodError, match=rf"--clusters {clusters}: .* has 8 experts per layer; choose 1 to 7"):
        raise run(*command, *calibration(example)).exception
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "mergemoe"], "--method mergemoe needs --clusters"),
        (["--clusters", "4"], "--clusters is for --method mergemoe"),
        *(
            (["--method", "mergemoe", "--clusters", "4", *option], f"{option[0]} is for --method puzzlemoe")
            for option in (
                ["--recipe", "paper"],
                ["--sparsity", "0.25"],
                ["--code", "angle8"],
                ["--rule", "paper"],
                ["--compensate"],
                ["--tau", "0.4"],
                ["--saliency", "magnitude"],
                ["--seed", "1"],
            )
        ),
    ],
)
def test_options_of_the_other_method(options, message, example, tmp_path):
    with pytest.raises(OptionError, match=message):
        raise run("compress", example / "model", tmp_path / "out", *options, *calibration(example)).exception


def test_clusters_of_another_model(tmp_path):
    pack(build("mixtral", tmp_path / "source"), tmp_path / "packed", 3)
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["clusters"]["1"] = [0, 0, 0]
    path.write_text(json.dumps(config))
    with pytest.raises(LayoutError, match=r"clusters of 3 experts in layer 1, the model has 8"):
        Checkpoint(tmp_path / "packed")
