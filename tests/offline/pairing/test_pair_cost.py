"""The search's errors are those of merging, and the partners that it finds are the ones that lose least."""

import json

import pytest
import torch
from support.models import build
from support.runs import compress_pairs, sentences

from puzzlemoe_offline.calibration.statistics import ExpertStatistics, projection_inputs
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import PROJECTIONS, Expert
from puzzlemoe_offline.pairing.pair_cost import merge_errors, shared_bits_errors
from puzzlemoe_offline.pairing.partners import pair_experts
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.words.nearest import column_importance, fit, pair_importance
from puzzlemoe_vllm.format.codes import CODES, TrellisCode, get_code

CPU = torch.device("cpu")
RECIPES = [
    {"code": name, "rule": rule}
    for name, code in CODES.items()
    if not isinstance(code, TrellisCode)
    for rule in code.rules or (None,)
]


def layer(experts: int, seed: int = 0) -> tuple[list[Expert], ExpertStatistics]:
    """Random experts of 48 x 64 weights, the first of which see most of the tokens and the last next to none."""
    torch.manual_seed(seed)
    made = [
        Expert(*(torch.randn(shape).bfloat16() for shape in ((64, 48), (64, 48), (48, 64)))) for _ in range(experts)
    ]
    statistics = ExpertStatistics.zeros(experts, 48, 64, CPU)
    for expert in range(experts):
        tokens = max(4, 400 >> expert)
        statistics.observe(
            expert,
            [tokens],
            torch.randn(tokens, 48) * torch.rand(48),
            torch.randn(tokens, 64) * torch.rand(64),
            torch.ones(tokens),
        )
    return made, statistics


@pytest.mark.parametrize("options", RECIPES)
@pytest.mark.parametrize("calibrated", [True, False])
def test_they_are_the_weighted_errors_of_merging_on_the_sampled_rows(options, calibrated):
    experts, statistics = layer(4)
    recipe, code = PairRecipe(**options), get_code(options["code"])
    seen, group = (statistics if calibrated else None), 16 if code.has_steps else None
    found = merge_errors([0, 1, 2, 3], experts.__getitem__, seen, recipe, group, CPU)
    assert torch.equal(found, found.T) and not found.diagonal().any()
    for a, b in ((0, 3), (1, 2)):
        expected = 0.0
        for index, projection in enumerate(PROJECTIONS):
            weights = [getattr(expert, projection) for expert in experts]
            rows = torch.linspace(0, len(weights[0]) - 1, -(-len(weights[0]) // 3)).round().long()
            inputs = [projection_inputs(seen, e, index, weights[0].shape[1], CPU) for e in range(4)]
            packed = fit(
                (weights[a][rows], weights[b][rows]), column_importance((inputs[a], inputs[b]), recipe), recipe, group
            )
            for position, expert in enumerate((a, b)):
                lost = weights[expert][rows].float() - code.decode(packed.words, position, packed.steps).float()
                energy = sum(
                    float((w[rows].float() * i.norms).square().sum()) for w, i in zip(weights, inputs, strict=True)
                )
                expected += float((lost * inputs[expert].norms).square().sum()) / energy
        assert float(found[a, b]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["trellis8", "trellis4"])
@pytest.mark.parametrize("ratio", [1.0, 30.0, 1e6])
def test_what_theory_says_of_shared_bits_is_nearly_what_words_lose(name, ratio):
    torch.manual_seed(5)
    sample, recipe = torch.randn(2, 16, 64).bfloat16(), PairRecipe(code=name)
    own = torch.rand(2, 64) * torch.tensor([[ratio], [1.0]])
    few = torch.zeros(2, 1, dtype=torch.bool)
    found, lost = shared_bits_errors(get_code(name), sample, own, few, own, recipe)
    importance = pair_importance((own[0], own[1]), few[0], recipe)
    packed = fit((sample[0], sample[1]), importance, recipe, 32)
    decoded = [get_code(name).decode(packed.words, position, packed.steps).float() for position in (0, 1)]
    measured = sum(float(((sample[e].float() - decoded[e]).square() * own[e]).sum()) for e in (0, 1))
    if ratio < 1e6:  # beyond that no word is so exact as theory would have it
        assert 0.9 < measured / float(found[0, 1]) < 2
    assert float(found[0, 1]) == pytest.approx(float(found[1, 0]))
    # An expert that hardly a token chose keeps some bits; none are left where its partner's weights are far larger.
    assert not lost[0, 1]
    sample[0] *= 1000
    assert shared_bits_errors(get_code(name), sample, own, few, own, recipe)[1][0, 1]


def test_partners_for_shared_bits_keep_busy_experts_apart():
    experts, statistics = layer(6)
    recipe = PairRecipe(code="trellis4")
    costs = merge_errors(list(range(6)), experts.__getitem__, statistics, recipe, 16, CPU)
    assert torch.equal(costs, costs.T) and not costs.diagonal().any()
    pairing = pair_experts(6, 0.5, 1, statistics.tokens, 0, lambda pool: costs)
    assert all(len({0, 1, 2} & set(pair)) == 1 for pair in pairing.pairs)


def test_busy_experts_are_kept_apart_and_twins_are_brought_together():
    experts, statistics = layer(6)
    recipe = PairRecipe(rule="least-squares")
    pairing = pair_experts(
        6,
        0.5,
        1,
        statistics.tokens,
        0,
        lambda pool: merge_errors(pool, experts.__getitem__, statistics, recipe, None, CPU),
    )
    busy = {0, 1, 2}
    assert all(len(busy & set(pair)) == 1 for pair in pairing.pairs)
    experts[1] = experts[0]
    errors = merge_errors(list(range(6)), experts.__getitem__, None, recipe, None, CPU)
    assert errors[0, 1] < 1e-9 < errors[0, 2]


def test_experts_that_no_token_chose_cost_nothing():
    experts, _ = layer(4)
    silent = ExpertStatistics.zeros(4, 48, 64, CPU)
    assert not merge_errors(
        [0, 1, 2, 3], experts.__getitem__, silent, PairRecipe(rule="least-squares"), None, CPU
    ).any()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
@pytest.mark.parametrize("sparsity", [0.5, 0.25])
def test_what_the_pairings_are_for(family, sparsity, tmp_path):
    """Search loses less than random partners do, coactivation loads less, in groups and at 25% too."""
    source = build(family, tmp_path / "source", seed=1)  # which has tokens that choose two experts of those that merge
    checkpoint, calibration = Checkpoint(source), sentences(source, 8, 128)
    reports = {}
    for pairing in ("random", "search", "coactivation", "balanced"):
        choices = {"rule": "least-squares", "pairing": pairing, "sparsity": sparsity}
        reports[pairing] = compress_pairs(source, tmp_path / pairing, calibration, **choices)
    lost = {
        pairing: sum(layer.get("output_error", 0) for layer in report["layers"]) for pairing, report in reports.items()
    }
    # With experts as alike as these there is little to find; sampling rows must not make it worse.
    assert lost["search"] <= 1.01 * lost["random"]
    loaded = {pairing: report["bytes_per_token"] for pairing, report in reports.items()}
    assert loaded["coactivation"]["this pairing"] <= min(loaded[p]["this pairing"] for p in ("random", "search"))
    assert (
        loaded["coactivation"]["this pairing"] <= loaded["coactivation"]["random partners"] < loaded["random"]["before"]
    )
    assert loaded["coactivation"]["this pairing"] <= loaded["balanced"]["this pairing"]
    assert loaded["balanced"]["this pairing"] <= 1.001 * loaded["search"]["this pairing"]
    assert loaded["random"]["before"] == expert_bytes_per_token(reports["random"], checkpoint)
    assert json.loads(json.dumps(loaded)) == loaded


def expert_bytes_per_token(report: dict, checkpoint: Checkpoint) -> float:
    config, layers = checkpoint.config, len(checkpoint.moe_layers)
    return layers * config["num_experts_per_tok"] * 6 * config["hidden_size"] * config["moe_intermediate_size"]


def test_a_search_without_calibration(tmp_path):
    source = build("qwen3_moe", tmp_path / "source")
    orders, errors = {}, {}
    for pairing in ("random", "search"):
        report = compress_pairs(source, tmp_path / pairing, pairing=pairing)
        assert report["bytes_per_token"] is None
        orders[pairing] = [layer["order"] for layer in report["layers"]]
        errors[pairing] = sum(sum(layer["weight_error"]) for layer in report["layers"])
    assert orders["search"] != orders["random"]
    assert errors["search"] <= 1.01 * errors["random"]
