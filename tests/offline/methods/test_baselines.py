"""Each baseline has the property that it is named for, and what it writes is a model that transformers loads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model_configs import EXPERT_COUNT, VOCABULARY
from support.models import build
from support.runs import compress_pairs, run_method
from torch import Tensor
from transformers import AutoModelForCausalLM

from puzzlemoe_offline.calibration.statistics import ProjectionInputs
from puzzlemoe_offline.calibration.text import Calibration
from puzzlemoe_offline.methods import BASELINES
from puzzlemoe_offline.methods.base import MethodError
from puzzlemoe_offline.methods.dropping import most_used
from puzzlemoe_offline.methods.gptq import gptq
from puzzlemoe_offline.methods.hc_smoe import clusters_of
from puzzlemoe_offline.methods.merge_three import groups_of_three, merge_group
from puzzlemoe_offline.methods.rounding import group_of, round_to_nearest
from puzzlemoe_offline.methods.single_trellis import SingleTrellis
from puzzlemoe_offline.methods.wanda import prune
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.families import FAMILIES, expert_groups
from puzzlemoe_offline.words.paper_rule import merge_pair

TOKENS = torch.randint(0, VOCABULARY - 1, (32, 64), generator=torch.Generator().manual_seed(0))
CALIBRATION = Calibration(TOKENS, "random tokens")
NATIVE = [name for name, family in FAMILIES.items() if not family.remote_config]


def write(source: Path, out: Path, name: str) -> Checkpoint:
    """The baseline's model, opened."""
    run_method(source, out, BASELINES[name], CALIBRATION)
    return Checkpoint(out)


def logits(folder: Path) -> Tensor:
    """transformers' own float32 logits on a few tokens; fails on missing tensors, and on unexpected ones but those of
    layers for multi-token prediction."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    beyond = f"model.layers.{model.config.num_hidden_layers}."
    assert all(name.startswith(beyond) for name in info["unexpected_keys"])
    with torch.no_grad():
        return model(TOKENS[:2]).logits


def projections(checkpoint: Checkpoint) -> list[tuple[Tensor, ...]]:
    """The gate, up and down projection of every expert."""
    return [
        (expert.gate, expert.up, expert.down)
        for layer in checkpoint.moe_layers
        for expert in (checkpoint.expert(layer, number) for number in range(checkpoint.experts))
    ]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return build("mixtral", tmp_path_factory.mktemp("baselines") / "mixtral")


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> Path:
    """A model whose experts 2p and 2p + 1 are the same."""
    folder = build("qwen3_moe", tmp_path_factory.mktemp("baselines") / "twins")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        for odd in (1, 3, 5, 7):
            if f".experts.{odd}." in name:
                tensors[name] = tensors[name.replace(f".experts.{odd}.", f".experts.{odd - 1}.")].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rounding_leaves_the_points_of_one_grid_per_group(bits):
    torch.manual_seed(0)
    weight = torch.randn(16, 256).bfloat16()
    groups, rounded = (tensor.float().unflatten(1, (-1, 128)) for tensor in (weight, round_to_nearest(weight, bits)))
    span = groups.amax(-1) - groups.amin(-1)
    step = span / (2**bits - 1)
    # Half a step, and what rounding scale and result to bf16 adds.
    slack = 2.0**-8 * span
    assert bool(((rounded - groups).abs().amax(-1) <= step / 2 + slack).all())
    assert max(len(group.unique()) for group in rounded.flatten(0, 1)) <= 2**bits
    assert min(len(group.unique()) for group in rounded.flatten(0, 1)) > min(2**bits, 128) / 2


def test_rounding_keeps_zero_and_a_constant_group():
    weight = torch.zeros(2, 128).bfloat16()
    weight[1] = 0.25
    assert torch.equal(round_to_nearest(weight, 4), weight)


def test_columns_that_no_group_divides_are_refused():
    assert [group_of(columns) for columns in (256, 192, 96)] == [128, 64, 32]
    with pytest.raises(MethodError, match="40 input columns"):
        group_of(40)


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_beats_rounding_in_output_error(bits):
    torch.manual_seed(1)
    weight = torch.randn(48, 256).bfloat16()
    x = torch.randn(1500, 64) @ torch.randn(64, 256) + torch.randn(1500, 256)
    seen = ProjectionInputs(x.norm(dim=0), len(x), x.T @ x)

    def error(approximation: Tensor) -> float:
        return float((x @ (approximation.float() - weight.float()).T).norm())

    assert error(gptq(weight, seen, bits)) < 0.8 * error(round_to_nearest(weight, bits))


def test_gptq_without_correlation_is_rounding():
    torch.manual_seed(2)
    weight = torch.randn(16, 256).bfloat16()
    assert torch.equal(
        gptq(weight, ProjectionInputs(torch.ones(256), 1, torch.eye(256)), 4), round_to_nearest(weight, 4)
    )


def test_wanda_keeps_the_two_most_salient_of_four():
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0, 1.0, 1.5, 0.5, 0.1]]).bfloat16()
    norms = torch.tensor([10.0, 1, 1, 1, 1, 1, 1, 100])
    expected = torch.tensor([[1.0, 0, 0, -4.0, 0, 1.5, 0, 0.1]]).bfloat16()
    assert torch.equal(prune(weight, norms), expected)


def test_dropping_keeps_the_experts_that_saw_most():
    assert most_used([5, 9, 0, 7], 2) == [1, 3]
    assert most_used([5, 5, 5, 7], 2) == [0, 3]


def test_clusters_join_the_nearest():
    features = torch.tensor([[0.0, 0], [10, 0], [0.1, 0], [10.3, 0], [0, 50]])
    assert clusters_of(features, 3) == [[0, 2], [1, 3], [4]]


def test_two_experts_merge_as_the_paper_merges_a_pair():
    torch.manual_seed(3)
    weights, norms = torch.randn(2, 32, 64).bfloat16(), torch.rand(2, 64)
    pair = merge_pair(*weights, *norms, 0.4)
    expected = torch.stack([pair.weight(0), pair.weight(1)])
    assert torch.equal(merge_group(weights, norms, 0.4), expected)


def test_three_experts_share_a_mean_or_leave_one():
    weights = torch.tensor([[1.0, 1.0, -1.0], [-1.2, 0.2, 3.0], [1.1, 1.0, 0.1]])[:, None]
    norms = torch.tensor([[1.0, 1, 10], [1, 1, 1], [1, 1.5, 1]])
    # Column 0: all similar.  1: the second is too small, the third more salient.  2: the first is the most salient.
    merged = merge_group(weights, norms, 0.2)[:, 0]
    expected = torch.tensor([[1.1, 0, -1.0], [-1.1, 0, 0], [1.1, 1.0, 0]])
    torch.testing.assert_close(merged, expected)


def test_groups_of_three_hold_every_expert_once():
    groups = groups_of_three(8, 5)
    assert [len(group) for group in groups] == [3, 3, 2]
    assert sorted(expert for group in groups for expert in group) == list(range(8))


@pytest.mark.parametrize("name", [name for name, method in BASELINES.items() if not isinstance(method, SingleTrellis)])
def test_a_written_mixtral_loads_in_transformers(name, mixtral, tmp_path):
    written = write(mixtral, tmp_path / "out", name)
    dense, changed = logits(mixtral), logits(tmp_path / "out")
    distance = float((changed - dense).norm() / dense.norm())
    bounds = {"int8": (1e-4, 0.05), "int4": (0.01, 0.5), "gptq-int4": (0.01, 0.5)}
    low, high = bounds.get(name, (0.01, 2.0))
    assert low < distance < high
    bits = BASELINES[name].bits_per_weight(Checkpoint(mixtral))
    assert (2 if name.endswith("int2") else 3) < bits < 13
    assert written.quantization is None
    if name == "wanda-2:4":
        for weights in projections(written):
            assert all(int((w != 0).unflatten(1, (-1, 4)).sum(-1).max()) == 2 for w in weights)
    if name.startswith("hc-smoe"):
        for layer in written.moe_layers:
            distinct = {written.expert(layer, number).down.float().sum().item() for number in range(8)}
            assert len(distinct) == 8 * bits / 16


@pytest.mark.parametrize("family", NATIVE)
def test_every_family_is_written_under_its_own_names(family, tmp_path):
    source = build(family, tmp_path / "source")
    opened = Checkpoint(source)
    keeps = expert_groups(opened.text) > 1 or any(".experts." in name for name in opened.copied)
    written = write(source, tmp_path / "out", "hc-smoe-50" if keeps else "drop-50")
    assert written.experts == (8 if keeps else 4)
    assert logits(tmp_path / "out").isfinite().all()


def test_dropping_removes_the_router_rows_of_the_experts_that_go(mixtral, tmp_path):
    written, source = write(mixtral, tmp_path / "out", "drop-25"), Checkpoint(mixtral)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config[EXPERT_COUNT["mixtral"]] == 6
    for layer in source.moe_layers:
        router, rows = (model.tensor(f"{model.block(layer)}.gate.weight") for model in (source, written))
        order = [int((router == row).all(dim=1).nonzero()) for row in rows]
        assert order == sorted(order) and len(order) == 6
        for new, old in enumerate(order):
            assert torch.equal(written.expert(layer, new).down, source.expert(layer, old).down)


def test_merging_identical_experts_loses_nothing(twins, tmp_path):
    written = write(twins, tmp_path / "out", "hc-smoe-50")
    for layer in written.moe_layers:
        for number in range(8):
            before, after = Checkpoint(twins).expert(layer, number), written.expert(layer, number)
            torch.testing.assert_close(after.down, before.down, rtol=2.0**-8, atol=0)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(twins), rtol=0.02, atol=0.02)


def test_fused_sources_are_written_expert_by_expert(tmp_path):
    outs = []
    for fused in (False, True):
        source = build("qwen3_moe", tmp_path / f"source{fused}", fused=fused)
        outs.append(write(source, tmp_path / f"out{fused}", "drop-25"))
    assert outs[0].names == outs[1].names
    assert all(torch.equal(outs[0].tensor(name), outs[1].tensor(name)) for name in outs[0].names)


def test_models_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    grouped = build("deepseek_v2", tmp_path / "grouped")
    with pytest.raises(MethodError, match="picks from 4 groups"):
        write(grouped, tmp_path / "out", "drop-25")
    hungry = build("mixtral", tmp_path / "hungry", num_experts_per_tok=5)
    with pytest.raises(MethodError, match="leave 4 of 8 experts, and every token needs 5"):
        write(hungry, tmp_path / "out", "drop-50")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_next", "qwen3_5_moe"])
def test_dropping_beside_a_layer_for_multi_token_prediction_is_refused(family, tmp_path):
    """That layer is copied with all its experts, which one number of experts in config.json could not say."""
    source = build(family, tmp_path / "source")
    with pytest.raises(MethodError, match=r"multi-token prediction is copied with all 8 experts.*hc-smoe-50"):
        write(source, tmp_path / "out", "drop-50")
    assert not (tmp_path / "out").exists()


def test_dropping_beside_a_dense_layer_for_multi_token_prediction(tmp_path):
    source = Checkpoint(build("ernie4_5_moe", tmp_path / "source"))
    assert source.copied
    assert write(source.folder, tmp_path / "out", "drop-50").experts == 4


def test_a_packed_source_is_refused(mixtral, tmp_path):
    compress_pairs(mixtral, tmp_path / "packed")
    with pytest.raises(MethodError, match="packed already"):
        BASELINES["int4"].check(Checkpoint(tmp_path / "packed"))
