"""Every code from compression to serving: what is written, unpacked and computed is one and the same model."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from support.models import build
from support.runs import compress_pairs, job_of, sentences, unpack

from puzzlemoe_offline.methods.base import MethodError
from puzzlemoe_offline.methods.pairs import PairMethod
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.inspection import inspect
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.run.plan import make_plan
from puzzlemoe_vllm.backends import ExpertWeights, reference
from puzzlemoe_vllm.errors import UserError
from puzzlemoe_vllm.format.codes import get_code
from puzzlemoe_vllm.format.layout import LayoutError
from puzzlemoe_vllm.format.shards import INDEX, index_with_records, save_shard, shard_metadata

BITS = {"mask16": 16, "angle16": 16, "angle8": 8.5, "angle6": 6.5, "mask6": 6.5, "trellis6": 6.5, "trellis3": 3.5}
"""Per pair, steps of 32 columns included."""


def pack(source, out, **recipe) -> dict:
    """Compresses with 8 windows of 128 bytes; returns the report."""
    calibration = sentences(source, 8, 128)
    plan = make_plan(job_of(source, PairMethod(PairRecipe(**recipe)), calibration))
    report = compress_pairs(source, out, calibration, **recipe)
    assert plan.sizes.experts_after == report["bytes"]["experts_after"] < plan.sizes.experts_before
    return report


ENTRYWISE = [name for name in BITS if not name.startswith("trellis")]


@pytest.mark.parametrize(
    "name, compensate",
    [*itertools.product(ENTRYWISE, [False, True]), ("trellis6", True), ("trellis3", False)],
)
def test_written_unpacked_and_served_weights_agree(name, compensate, tmp_path):
    # A CPU takes a while for a trellis.
    source = build("mixtral", tmp_path / "source", **({} if name in ENTRYWISE else {"num_hidden_layers": 1}))
    report = pack(source, tmp_path / "packed", code=name, compensate=compensate, **least_squares(name))
    packed = Checkpoint(tmp_path / "packed")
    assert packed.quantization.group_size == (32 if get_code(name).has_steps else None)
    dense, facts = inspect(Checkpoint(source))["bytes"], inspect(packed)["bytes"]
    assert facts["experts, merged"] == dense["experts, dense"] * BITS[name] / 32 == report["bytes"]["experts_after"]
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    unpacked = Checkpoint(tmp_path / "unpacked")
    for expert in range(8):
        ours, theirs = packed.expert(0, expert), unpacked.expert(0, expert)
        served = reference.expert_weights(one_pair(packed, expert & ~1), expert & 1)
        assert torch.equal(torch.cat([ours.gate, ours.up]), served[0]) and torch.equal(ours.down, served[1])
        assert torch.equal(torch.cat([theirs.gate, theirs.up]), served[0]) and torch.equal(theirs.down, served[1])


def least_squares(name: str) -> dict[str, str]:
    """That rule, of a code that has another too."""
    return {"rule": "least-squares"} if get_code(name).rules else {}


def one_pair(packed: Checkpoint, leader: int) -> ExpertWeights:
    """A pair of layer 0 as vLLM holds it."""
    words = [packed.pair_words(0, leader, name) for name in packed.family.projections]
    steps = [packed.pair_steps(0, leader, name) for name in packed.family.projections]
    w13_steps, w2_steps = (None, None) if steps[0] is None else (torch.cat(steps[:2])[None], steps[2][None])
    none = torch.empty(0, 0, 0)
    w13 = torch.cat(words[:2])[None]
    return ExpertWeights(w13, words[2][None], none, none, None, packed.quantization.code, w13_steps, w2_steps)


def test_codes_that_lose_less_lose_less(tmp_path):
    source = build("mixtral", tmp_path / "source", hidden_size=128, intermediate_size=128)
    errors = {}
    for key, recipe in {
        "paper": {},
        "least-squares": {"rule": "least-squares"},
        "angle16": {"code": "angle16"},
        "angle8": {"code": "angle8"},
        "angle6": {"code": "angle6"},
    }.items():
        layers = pack(source, tmp_path / key, **recipe)["layers"]
        errors[key] = sum(layer["output_error"] for layer in layers)
    assert errors["angle8"] < errors["angle6"] < errors["least-squares"] < errors["paper"]
    assert errors["angle16"] < errors["angle6"]


def test_a_group_size_that_does_not_fit_names_one_that_does(tmp_path):
    source = build("mixtral", tmp_path / "source")
    with pytest.raises(MethodError, match=r"128 and intermediate size 96 .* --group-size 64; use --group-size 32"):
        pack(source, tmp_path / "packed", code="angle8", group_size=64)
    assert not (tmp_path / "packed").exists()


def test_damaged_steps_are_found(tmp_path):
    source = build("mixtral", tmp_path / "source")
    pack(source, tmp_path / "packed", code="angle8")
    name = "model.layers.0.block_sparse_moe.experts.2.w3.puzzle_grid"
    packed = Checkpoint(tmp_path / "packed")
    shard, layout = tmp_path / "packed" / packed.file_of(name), packed.quantization
    index = json.loads((tmp_path / "packed" / INDEX).read_text())
    whole = load_file(shard)
    for damage, message in (
        (lambda steps: steps.float(), "F32"),
        (lambda steps: steps[:, 1:].contiguous(), r"\(96, 3\)"),
        (lambda steps: steps * torch.nan, "NaN or infinite"),
        (lambda steps: None, ""),
    ):
        damaged = {key: value for key, value in (whole | {name: damage(whole[name])}).items() if value is not None}
        save_shard(damaged, shard, shard_metadata("angle8"))
        (tmp_path / "packed" / INDEX).write_text(json.dumps(index))
        with pytest.raises(LayoutError, match=shard.name):
            inspect(Checkpoint(tmp_path / "packed"))
        # As if it had been written so, with digests of its own.
        weight_map = {key: file for key, file in index["weight_map"].items() if file != shard.name}
        weight_map |= dict.fromkeys(damaged, shard.name)
        own = index_with_records(tmp_path / "packed", weight_map, 0, layout)
        (tmp_path / "packed" / INDEX).write_text(json.dumps(own))
        with pytest.raises(UserError, match=f"({name}|experts.2|expert 2, w3).*{message}"):
            inspect(Checkpoint(tmp_path / "packed"))


@pytest.mark.parametrize(
    "recipe",
    [{"compensate": True}, {"code": "angle8", "compensate": True, "saliency": "magnitude"}, {"group_size": 64}],
)
def test_choices_that_contradict_each_other(recipe):
    with pytest.raises(ValueError, match=r"compensation needs|no group steps"):
        PairRecipe(**recipe)
