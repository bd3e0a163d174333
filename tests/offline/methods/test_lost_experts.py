"""Experts that a pair would lose, dead ones and such with outliers: found, named, and left dense."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.models import build
from support.runs import compress_pairs, job_of, run_method, sentences, unpack
from torch import Tensor

from puzzlemoe_offline.calibration.statistics import ExpertStatistics, projection_inputs
from puzzlemoe_offline.methods.base import LayerRecord, MethodError
from puzzlemoe_offline.methods.mergemoe import MergeMoe
from puzzlemoe_offline.methods.pairs import PairMethod
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_offline.model.inspection import inspect
from puzzlemoe_offline.pairing.lost import LOST
from puzzlemoe_offline.recipe import ClusterRecipe, PairRecipe, named_recipe
from puzzlemoe_offline.run.card import model_card
from puzzlemoe_offline.run.report import Report, worst_expert
from puzzlemoe_offline.words.neurons import facing_orders, neuron_energies
from puzzlemoe_offline.words.pack import Losses, pack_pairs
from puzzlemoe_vllm.format.codes import CODES, TableCode, TrellisCode, UnencodableWeight, get_code

RECIPES = [
    {"code": name, "rule": "least-squares" if code.rules else None}
    for name, code in CODES.items()
    if not isinstance(code, TrellisCode) or name == "trellis4"
]
DEFAULT = named_recipe("default").model_dump(exclude_none=True)
CODES_WITH_STEPS = [name for name, code in CODES.items() if isinstance(code, TableCode)] + ["trellis3"]


def spoiled(folder: Path, change: Callable[[Tensor], Tensor], pattern: str, family: str = "mixtral", **config) -> Path:
    """A tiny model, the tensors of which whose names contain a pattern are changed."""
    build(family, folder, **config)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if pattern in name]:
        tensors[name] = change(tensors[name]).to(torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def dead(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight)


def almost_dead(weight: Tensor) -> Tensor:
    return weight * 1e-6


def with_outliers(weight: Tensor) -> Tensor:
    """One weight in 64 of every row is 1e4."""
    changed = weight.clone()
    changed[:, ::64] = 1e4
    return changed


def huge(weight: Tensor) -> Tensor:
    return weight * 1e4


def own_errors(layer: dict) -> list[float]:
    return [max(errors) for errors in layer["expert_weight_error"]]


@pytest.mark.parametrize("change", [dead, almost_dead, with_outliers, huge])
@pytest.mark.parametrize("options", [DEFAULT, {"code": "angle6", "pairing": "random"}, {"code": "mask6"}])
def test_experts_that_a_pair_would_lose_stay_dense(change, options, tmp_path):
    source = spoiled(tmp_path / "source", change, "layers.0.block_sparse_moe.experts.3.")
    report = compress_pairs(source, tmp_path / "packed", sentences(source, 8, 128), **options)
    first, second = report["layers"]
    assert first["merged"] == 6 and second["merged"] == 8
    assert first["spared"] == sorted(first["order"][6:]) and 3 in first["spared"] and second["spared"] == []
    assert first["lost"] == second["lost"] == []
    assert max(own_errors(first)) < LOST and own_errors(first)[3] == 0
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    kept = Checkpoint(tmp_path / "unpacked").expert(0, first["order"].index(3))
    assert all(map(torch.equal, kept.matrices, Checkpoint(source).expert(0, 3).matrices))
    held = inspect(Checkpoint(tmp_path / "packed"))["bytes"]
    assert report["bytes"]["experts_after"] == held["experts, merged"] + held["experts, dense"]
    assert report["bytes"]["experts_after"] > job_of(source, PairMethod(PairRecipe(**options))).experts_after
    assert f"2 experts (layer 0: {', '.join(map(str, first['spared']))}): stay dense" in card_of(tmp_path / "packed")


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_two_dead_experts_are_partners(tmp_path):
    source = spoiled(tmp_path / "source", dead, "layers.0.block_sparse_moe.experts.3.")
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if "layers.0.block_sparse_moe.experts.6." in name]:
        tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    first = compress_pairs(source, tmp_path / "packed", sentences(source, 8, 128), **DEFAULT)["layers"][0]
    assert first["merged"] == 8 and first["spared"] == []
    order = first["order"]
    assert order.index(3) ^ 1 == order.index(6)
    assert own_errors(first)[3] == own_errors(first)[6] == 0


@pytest.mark.parametrize("pairing", ["search", "random"])
def test_groups_with_such_an_expert_stay_dense_and_whole(pairing, tmp_path):
    source = spoiled(tmp_path / "source", dead, "layers.1.mlp.experts.5.", "deepseek_v2")
    recipe = DEFAULT | {"pairing": pairing}
    layer = compress_pairs(source, tmp_path / "packed", sentences(source, 8, 128), **recipe)["layers"][1]
    assert layer["merged"] == 6 and layer["spared"] == layer["order"][6:] == [4, 5]
    assert all(a // 2 == b // 2 for a, b in zip(layer["order"][::2], layer["order"][1::2], strict=True))


def test_the_papers_recipe_merges_them_all_the_same_and_names_them(tmp_path):
    plain = build("mixtral", tmp_path / "plain")
    source = spoiled(tmp_path / "source", huge, "layers.0.block_sparse_moe.experts.3.")
    order = compress_pairs(plain, tmp_path / "as it is", sentences(plain, 8, 128))["layers"][0]["order"]
    report = compress_pairs(source, tmp_path / "packed", sentences(source, 8, 128))
    first = report["layers"][0]
    assert first["order"] == order and first["merged"] == 8 and first["spared"] == []
    assert first["lost"] == [order[order.index(3) ^ 1]]
    assert f"1 experts (layer 0: {first['lost'][0]}): merging lost these" in card_of(tmp_path / "packed")


def test_a_model_of_which_nothing_can_merge_is_refused(tmp_path):
    source = spoiled(tmp_path / "source", dead, ".experts.1.", num_local_experts=2)
    with pytest.raises(MethodError, match=r"in every pair .* --recipe paper"):
        compress_pairs(source, tmp_path / "packed", sentences(source, 8, 128), **DEFAULT)


@pytest.mark.parametrize("options", RECIPES[1:])
def test_what_a_dead_expert_would_come_to(options):
    """Why it must not happen: with directions it comes alive, at a tenth of its partner's size or more."""
    torch.manual_seed(0)
    recipe = PairRecipe(**options)
    alive = Expert(*(torch.randn(64, 64).bfloat16() for _ in range(3)))
    losses = Losses()
    group = 32 if get_code(recipe.code).has_steps else None
    dead = Expert(*map(torch.zeros_like, alive.matrices))
    (packed,) = pack_pairs([(alive, dead)], [(0, 1)], None, None, recipe, group, [losses])
    woken = get_code(recipe.code).decode(packed[0].words, 1, packed[0].steps).float()
    assert losses.relative(1) == [None] * 3 if woken.any() else losses.relative(1) == [0.0] * 3
    assert ("mask" not in recipe.code) == bool(woken.square().mean().sqrt() > 0.1)


def test_own_errors_are_those_of_the_written_experts(tmp_path):
    source = build("qwen3_moe", tmp_path / "source")
    layer = compress_pairs(source, tmp_path / "packed", sentences(source, 8, 128), **DEFAULT)["layers"][1]
    for expert, errors in enumerate(layer["expert_weight_error"]):
        exact, kept = (
            Checkpoint(source).expert(1, expert),
            Checkpoint(tmp_path / "packed").expert(1, layer["order"].index(expert)),
        )
        for error, weight, written in zip(errors, exact.matrices, kept.matrices, strict=True):
            expected = (weight.double() - written.double()).norm() / weight.double().norm()
            assert error == pytest.approx(float(expected), rel=1e-6)
    chosen = [error for error in layer["expert_output_error"] if error is not None]
    assert len(chosen) == sum(map(bool, layer["tokens"])) and all(0 < error < 0.5 for error in chosen)
    # A layer's output mixes its experts': it loses about what they do.
    assert min(chosen) * 0.5 < layer["output_error"] < max(chosen)
    report = Report.model_validate_json((tmp_path / "packed" / "puzzlemoe_report.json").read_text())
    worst = max(report.layers, key=lambda one: worst_expert(one)[1])
    expert, error = worst_expert(worst)
    assert error == max(e for e in worst.expert_output_error if e is not None)
    assert f"{error:.4f}, expert {expert} of the source's layer {worst.layer} |" in card_of(tmp_path / "packed")
    assert f"{error:.4f}, expert {expert}" in model_card(job_of(source, PairMethod(PairRecipe(**DEFAULT))), report)


def test_the_worst_expert_by_weights_where_no_text_was_seen():
    record = LayerRecord(layer=0, expert_weight_error=[[0.1, 0.2, 0.1], [0.0, 0.3, 0.0]])
    assert worst_expert(record) == (1, 0.3)
    assert worst_expert(LayerRecord(layer=0, expert_weight_error=[[0.5] * 3, [0.1, None, 0.1]])) == (1, float("inf"))
    assert worst_expert(LayerRecord(layer=0)) is None


def test_clusters_have_own_errors_too(tmp_path):
    source = build("mixtral", tmp_path / "source")
    method = MergeMoe(ClusterRecipe(clusters=3))
    for layer in run_method(source, tmp_path / "packed", method, sentences(source, 8, 128))["layers"]:
        alone = [e for e in range(8) if layer["centres"].count(layer["centres"][e]) == 1]
        assert all(layer["expert_output_error"][e] in (0, None) for e in alone)
        assert max(error or 0 for error in layer["expert_output_error"]) > layer["output_error"] > 0


def beyond(weight: Tensor) -> Tensor:
    return torch.full_like(weight, torch.finfo(torch.bfloat16).max)


@pytest.mark.parametrize("pairing", ["random", "search"])
@pytest.mark.parametrize("code", CODES_WITH_STEPS)
def test_weights_beyond_what_steps_hold_are_refused_by_name(code, pairing, tmp_path):
    source = spoiled(tmp_path / "source", beyond, "layers.1.block_sparse_moe.experts.")
    with pytest.raises(
        UnencodableWeight,
        match=r"^layer 1, experts \d and \d, gate projection: a step is NaN, infinite or above 130560",
    ):
        compress_pairs(source, tmp_path / "packed", code=code, pairing=pairing)


@pytest.mark.parametrize("options", [DEFAULT, {}])
def test_activations_beyond_float32_are_refused_by_name(options, tmp_path):
    source = spoiled(tmp_path / "source", lambda norm: norm * 1e19, "layers.1.post_attention_layernorm")
    with pytest.raises(MethodError, match=r"^layer 1, expert \d: .*; use --saliency magnitude.*again"):
        compress_pairs(source, tmp_path / "packed", sentences(source, 8, 128), **options)
    compress_pairs(source, tmp_path / "by magnitude", saliency="magnitude", **{"code": "angle8"})
    with pytest.raises(MethodError, match=r"^layer 1, experts \d.*--saliency magnitude"):
        run_method(source, tmp_path / "few", MergeMoe(ClusterRecipe(clusters=2)), sentences(source, 8, 128))


def test_a_report_is_valid_json_whatever_was_measured(tmp_path):
    source = build("mixtral", tmp_path / "source")
    compress_pairs(source, tmp_path / "packed", sentences(source, 8, 128))
    report = Report.model_validate_json((tmp_path / "packed" / "puzzlemoe_report.json").read_text())
    report.seconds["merge"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        report.text()

    def refused(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((tmp_path / "packed" / "puzzlemoe_report.json").read_text(), parse_constant=refused)


def matrices(scale: float, shape: str, seed: int) -> Tensor:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)) * scale
    if shape == "one row huge":
        weight[3] *= 1e4
    if shape == "one weight huge":
        weight[5, 7] = 1e4
    if shape == "half zero":
        weight[:, ::2] = 0
    return weight.bfloat16()


exponent = st.one_of(st.just(None), st.floats(-40, 4))
shape = st.sampled_from(["even", "one row huge", "one weight huge", "half zero"])


@settings(deadline=None, max_examples=60)
@given(exponent, exponent, shape, shape, st.sampled_from(RECIPES), st.booleans(), st.booleans())
def test_pairs_of_any_sizes_decode_to_finite_weights_and_every_loss_is_told(
    first, second, shape0, shape1, options, paper, compensate
):
    """10^-40 is a denormal of bf16, None is zero."""
    scales = [0.0 if power is None else 10.0**power for power in (first, second)]
    weights = [matrices(*which) for which in zip(scales, (shape0, shape1), (1, 2), strict=True)]
    if paper and "mask16" in options["code"]:
        options, compensate = {"code": "mask16"}, False
    recipe, code = PairRecipe(**options, compensate=compensate), get_code(options["code"])
    statistics = ExpertStatistics.zeros(2, 32, 32, torch.device("cpu"), moments=compensate)
    for expert in (0, 1):
        statistics.observe(expert, [64], torch.randn(64, 32), torch.randn(64, 32), torch.ones(64))
    losses = Losses()
    weights = [torch.cat([weight, weight]) for weight in weights]
    pair = [Expert(weight, weight, weight) for weight in weights]
    try:
        group = 32 if code.has_steps else None
        (packed,) = pack_pairs([(pair[0], pair[1])], [(0, 1)], statistics, None, recipe, group, [losses])
    except UnencodableWeight as error:
        assert max(float(weight.abs().max()) for weight in weights) > 1e5, error
        return
    for position, weight in enumerate(weights):
        # The order of a trellis's neurons, which are rows here, is free.
        if isinstance(code, TrellisCode):
            energies = [
                neuron_energies(one, projection_inputs(statistics, e, 2, 32, "cpu")) for e, one in enumerate(pair)
            ]
            weight = weight[facing_orders((energies[0], energies[1]))[position]]
        decoded = code.decode(packed[0].words, position, packed[0].steps).double()
        assert decoded.isfinite().all()
        energy, error = weight.double().norm(), (decoded - weight.double()).norm()
        told = losses.relative(position)[0]
        if energy:
            assert told == pytest.approx(float(error / energy), rel=1e-9)
        else:
            assert told is None if error else told == 0
