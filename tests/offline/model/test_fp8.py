"""FP8 checkpoints are read as the bf16 that they stand for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import puzzlemoe
from support.fp8 import FORMS, WEIGHTS, write_bf16, write_fp8
from support.models import build
from support.runs import compress_pairs, job_of, run_method, sentences, unpack
from torch import Tensor

from puzzlemoe_offline.methods.pairs import PairMethod
from puzzlemoe_offline.methods.rounding import RoundToNearest
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.fp8 import Fp8Error, form_of
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.score.perplexity import perplexity
from puzzlemoe_vllm.errors import UserError

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v2")
BY_BLOCKS = ("deepseek_v3", "glm4_moe", "minimax_m2", "qwen3_next", "qwen3_5_moe")
"""Families whose hub has them in FP8 by blocks, with routers' biases, layers for multi-token prediction, or a tower."""

PROJECTION = "model.layers.1.mlp.experts.3.up_proj.weight"


def models(folder: Path, family: str, form: str, **sizes: int) -> tuple[Path, Path]:
    """An FP8 model, and the bf16 one that it stands for, under one name in two folders."""
    source = build(family, folder / "original", fused=form == "fused", **sizes)
    quantized = write_fp8(source, folder / "fp8" / "model", form)
    return quantized, write_bf16(quantized, folder / "bf16" / "model")


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_is_that_of_the_bf16_model(tmp_path, form):
    # 192 rows and columns are one block and a half.
    quantized, bf16 = (Checkpoint(folder) for folder in models(tmp_path, "qwen3_moe", form, moe_intermediate_size=192))
    LayerwiseModel(quantized, "cpu")
    assert quantized.names == bf16.names
    for name in bf16.names:
        assert torch.equal(quantized.plain_tensor(name), bf16.plain_tensor(name)), name
    for expert in range(bf16.experts):
        pairs = zip(quantized.expert(1, expert).matrices, bf16.expert(1, expert).matrices, strict=True)
        assert all(a.dtype == torch.bfloat16 and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *((family, form) for family in FAMILIES for form in ("deepseek", "FP8_DYNAMIC", "FP8")),
        *((family, "deepseek") for family in BY_BLOCKS),
    ],
)
def test_every_command_writes_what_it_writes_of_the_bf16_model(tmp_path, family, form):
    quantized, bf16 = models(tmp_path, family, form)
    calibration = sentences(bf16, 4, 64)
    for source in (quantized, bf16):
        out = source.parent
        compress_pairs(source, out / "packed", calibration, pairing="search")
        unpack(out / "packed", out / "unpacked")
        run_method(source, out / "int4", RoundToNearest(4))
    for name in ("packed", "unpacked", "int4"):
        written = shards(quantized.parent / name)
        assert written and written == shards(bf16.parent / name)
    configs = [Checkpoint(source.parent / "unpacked").config for source in (quantized, bf16)]
    assert configs[0] == configs[1] and "quantization_config" not in configs[0]
    assert Checkpoint(quantized.parent / "packed").config["quantization_config"]["quant_method"] == "puzzlemoe"
    windows = calibration.tokens[:2]
    scores = [perplexity(LayerwiseModel(Checkpoint(source), "cpu"), windows) for source in (quantized, bf16)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("family", BY_BLOCKS)
def test_what_is_copied_becomes_bf16_and_float32_stays(tmp_path, family):
    source = build(family, tmp_path / "original")
    quantized = Checkpoint(write_fp8(source, tmp_path / "fp8", "deepseek", more=("mtp.fc.weight", "linear_fc1.weight")))
    planned = job_of(quantized.folder, PairMethod(PairRecipe(saliency="magnitude"))).sizes
    report = compress_pairs(quantized.folder, tmp_path / "packed")
    packed, bf16 = Checkpoint(tmp_path / "packed"), Checkpoint(source)
    assert packed.copied == quantized.copied == bf16.copied
    if packed.copied:
        assert any(quantized.stored(name).dtype == torch.float8_e4m3fn for name in packed.copied)
    for name in packed.copied:
        assert packed.stored(name).dtype == bf16.stored(name).dtype
        assert torch.equal(packed.stored(name), quantized.tensor(name))
    for layer in packed.moe_layers:
        for name in packed.router(layer):
            assert packed.stored(name).dtype == bf16.stored(name).dtype
    assert report["bytes"]["copied"] == packed.copied_bytes == planned.copied == bf16.copied_bytes
    assert report["bytes"]["other"] == packed.stored_bytes(routed=False) == planned.other == bf16.other_bytes
    assert report["bytes"]["other_before"] == quantized.stored_bytes(routed=False) < planned.other


def test_copied_tensors_in_fp8_without_scales_are_refused(tmp_path):
    source = build("qwen3_next", tmp_path / "source")
    edited(source, lambda tensors: tensors.update({"mtp.fc.weight": tensors["mtp.fc.weight"].to(torch.float8_e4m3fn)}))
    assert "mtp.fc.weight in model.safetensors: dtype F8_E4M3 is not bf16" in refusal(source)


def test_inspect_and_a_dry_run(tmp_path, capsys):
    quantized, bf16 = models(tmp_path, "qwen3_moe", "deepseek")
    assert puzzlemoe("inspect", quantized) == 0
    assert "every tensor is present, well-formed and finite" in capsys.readouterr().out
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times. " * 200)
    plans = []
    for source in (quantized, bf16):
        options = "--calibration", text, "--samples", 2, "--sequence-length", 64, "--device", "cpu", "--dry-run"
        assert puzzlemoe("compress", source, tmp_path / "out", *options) == 0
        said = capsys.readouterr().out.splitlines()
        plans.append(
            [re.sub(r"[\d.]+ .B -> |, unchanged| +", "", line) for line in said if "weigh" in line or "disk" in line]
        )
    assert len(plans[0]) == 3 and plans[0] == plans[1]


def test_plan_holds_what_is_read(tmp_path):
    quantized, bf16 = (Checkpoint(folder) for folder in models(tmp_path, "deepseek_v2", "deepseek"))
    assert quantized.other_bytes == bf16.other_bytes and quantized.routed_bytes == bf16.routed_bytes
    assert quantized.nbytes(PROJECTION) == bf16.nbytes(PROJECTION) // 2 + 4


def edited(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        checkpoint = Checkpoint(folder)
        LayerwiseModel(checkpoint, "cpu")
        checkpoint.expert(1, 3)
    text = str(error.value)
    assert len(text) <= 400 and text.isprintable()
    return text


SCALE = f"{PROJECTION}_scale_inv"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(SCALE), f"{PROJECTION} is FP8, but its scale {SCALE} is missing"),
        (lambda t: t.update({SCALE: t[SCALE].reshape(-1)}), f"{SCALE} is F32 (1,), but config.json asks for (1, 1)"),
        (lambda t: t.update({SCALE: torch.ones(2, 1)}), f"{SCALE} is F32 (2, 1), but config.json asks for (1, 1)"),
        (lambda t: t.update({SCALE: t[SCALE].int()}), f"{SCALE} is I32 (1, 1), but"),
        (lambda t: t.update({SCALE: t[SCALE] * float("nan")}), f"{SCALE} holds NaN or infinite scales"),
        (lambda t: t.update({SCALE: t[SCALE] / 0}), f"{SCALE} holds NaN or infinite scales"),
        (lambda t: t.update({PROJECTION: t[PROJECTION].bfloat16()}), f"{SCALE} is the scale of no FP8 weight"),
        (lambda t: t.update({"model.norm.weight_scale": torch.ones(1)}), "model.norm.weight_scale is the scale of no"),
        (lambda t: t.update({"model.norm.input_scale": torch.ones(1)}), "model.norm.input_scale is the scale of no"),
        (lambda t: t.update({PROJECTION: t[PROJECTION].to(torch.float8_e5m2)}), f"{SCALE} is the scale of no FP8"),
        (lambda t: t[PROJECTION].view(torch.uint8)[3, 4].fill_(0x7F), f"{PROJECTION} in "),
        (lambda t: t.update({PROJECTION: t[PROJECTION].reshape(-1)}), f"{PROJECTION} is FP8 of shape (8192,)"),
    ],
)
def test_refusals(tmp_path, edit, message):
    quantized = write_fp8(build("qwen3_moe", tmp_path / "original"), tmp_path / "fp8", "deepseek")
    assert message in refusal(edited(quantized, edit))


def test_a_form_without_fp8_weights_is_refused(tmp_path):
    quantized = write_fp8(build("qwen3_moe", tmp_path / "original"), tmp_path / "fp8", "deepseek")
    original = load_file(tmp_path / "original" / WEIGHTS)
    save_file(original, quantized / WEIGHTS)
    assert "quantization_config says FP8, but no tensor is" in refusal(quantized)


def test_fp8_tensors_that_config_json_does_not_know_are_refused(tmp_path):
    quantized = write_fp8(build("qwen3_moe", tmp_path / "original"), tmp_path / "fp8", "deepseek")
    (quantized / "config.json").write_bytes((tmp_path / "original" / "config.json").read_bytes())
    assert "is a quantized model's, whatever config.json says" in refusal(quantized)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), "int-quantized"),
        (("config_groups", "group_0", "weights", "num_bits"), 4),
        (("config_groups", "group_0", "weights", "type"), "int"),
        (("config_groups", "group_0", "weights", "symmetric"), False),
        (("config_groups", "group_0", "weights", "strategy"), "group"),
        (("config_groups", "group_0"), None),
        (("config_groups",), {}),
        (("sparsity_config",), {"format": "sparse-24-bitmask"}),
    ],
)
def test_other_compressed_tensors_are_no_form(path, value):
    config = FORMS["FP8_DYNAMIC"]
    assert form_of(config)

    def changed(fields: dict, path: tuple[str, ...]) -> dict:
        return fields | {path[0]: changed(fields[path[0]], path[1:]) if len(path) > 1 else value}

    assert form_of(changed(config, path)) is None


@pytest.mark.parametrize("size", [[128], [0, 128], "128", [128, 128.0], 128])
def test_odd_block_sizes_are_no_form(size):
    assert form_of(FORMS["deepseek"] | {"weight_block_size": size}) is None


def test_an_error_of_its_own(tmp_path):
    quantized = write_fp8(build("qwen3_moe", tmp_path / "original"), tmp_path / "fp8", "deepseek")
    with pytest.raises(Fp8Error):
        Checkpoint(edited(quantized, lambda tensors: tensors.pop(SCALE)))
