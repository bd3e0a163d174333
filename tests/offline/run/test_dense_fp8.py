"""`--dense fp8`: linear layers outside experts in FP8, beside packed experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import puzzlemoe
from support.fp8 import write_fp8
from support.models import build
from support.runs import job_of, run_method, unpack
from torch import Tensor

from puzzlemoe_offline.methods.pairs import PairMethod
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.fp8 import Fp8Error
from puzzlemoe_offline.model.fp8_layers import fp8_bytes, fp8_weights
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_vllm.format.fp8 import dequantize, quantize
from puzzlemoe_vllm.format.layout import LayoutError, parse_config
from puzzlemoe_vllm.format.packed_folder import check_headers

METHOD = PairMethod(PairRecipe(saliency="magnitude"))
ATTENTION = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "kqvo"]


def packed_in_fp8(source: Path, out: Path) -> Checkpoint:
    run_method(source, out, METHOD, dense="fp8")
    return Checkpoint(out)


def qwen3(folder: Path, **overrides: Any) -> Path:
    """With attention of whole blocks."""
    return build("qwen3_moe", folder, head_dim=64, **overrides)


def test_what_the_source_has_by_blocks_is_kept(tmp_path):
    source = Checkpoint(write_fp8(qwen3(tmp_path / "bf16"), tmp_path / "source", "qwen"))
    packed = packed_in_fp8(source.folder, tmp_path / "packed")
    assert packed.quantization and sorted(packed.quantization.fp8) == sorted(ATTENTION)
    for layer in ATTENTION:
        name = f"{layer}.weight"
        assert torch.equal(packed.stored(name).view(torch.uint8), source.stored(name).view(torch.uint8))
        assert packed.scale(name).dtype == torch.float32
        assert torch.equal(packed.scale(name), source.scale(name).float())


def test_blocks_that_are_not_whole_are_kept_as_well(tmp_path):
    source = Checkpoint(write_fp8(build("deepseek_v2", tmp_path / "bf16"), tmp_path / "source", "deepseek"))
    packed = packed_in_fp8(source.folder, tmp_path / "packed")
    for name, shape, scales in (
        ("model.layers.0.mlp.down_proj.weight", (128, 192), (1, 2)),
        ("model.layers.0.self_attn.kv_b_proj.weight", (256, 64), (2, 1)),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", (96, 128), (1, 1)),
    ):
        assert packed.shape(name) == shape and packed.scale(name).shape == scales
        assert torch.equal(packed.plain_tensor(name), source.plain_tensor(name))


def test_a_block_that_vllm_would_cut_is_not_kept(tmp_path):
    """Of layers that it makes one, rows that end within a block would shift the blocks of the next."""
    source = build("deepseek_v3", tmp_path / "bf16", q_lora_rank=128)
    source = Checkpoint(write_fp8(source, tmp_path / "source", "deepseek"))
    packed = packed_in_fp8(source.folder, tmp_path / "packed")
    assert packed.quantization
    up, down = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    assert source.shape(f"{up}.weight") == (192, 128) and source.in_blocks(f"{up}.weight")
    assert up not in packed.quantization.fp8 and down in packed.quantization.fp8
    assert torch.equal(packed.stored(f"{up}.weight"), source.tensor(f"{up}.weight"))
    last = "model.layers.0.self_attn.kv_a_proj_with_mqa"
    assert source.shape(f"{last}.weight") == (96, 128) and last in packed.quantization.fp8


@pytest.mark.parametrize("form", [None, "FP8_DYNAMIC"])
def test_what_it_has_otherwise_is_quantized(tmp_path, form):
    source = qwen3(tmp_path / "source")
    source = Checkpoint(write_fp8(source, tmp_path / "fp8", form) if form else source)
    packed = packed_in_fp8(source.folder, tmp_path / "packed")
    assert packed.quantization and sorted(packed.quantization.fp8) == sorted(ATTENTION)
    for layer in ATTENTION:
        weights, before = packed.plain_tensor(f"{layer}.weight").float(), source.plain_tensor(f"{layer}.weight").float()
        assert 0.005 < (weights - before).norm() / before.norm() < 0.03  # E4M3's is 0.026 of normal weights


def test_layers_that_vllm_fuses_stay_together(tmp_path):
    # k_proj and v_proj have half a block of rows.
    source = Checkpoint(build("qwen3_moe", tmp_path / "source"))
    assert fp8_weights(source) == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)}


def test_routers_embedding_and_head_stay(tmp_path):
    names = fp8_weights(Checkpoint(build("deepseek_v2", tmp_path / "source", qk_nope_head_dim=96, vocab_size=384)))
    kinds = {name.split(".", 3)[3] for name in names}
    shared = {f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert kinds == {"self_attn.q_proj.weight", "self_attn.o_proj.weight"} | shared


def is_cut(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a weight is one to vLLM with others, of which one before the last ends within a block."""
    module = name.removesuffix(".weight").rpartition(".")[0]
    for first, *others in (("q", "k", "v"), ("q_a", "kv_a"), ("gate", "up")):
        names = [f"{module}.{one}_proj{'_with_mqa' * (one == 'kv_a')}.weight" for one in (first, *others)]
        if name in names and names[-1] in checkpoint.names:
            return any(checkpoint.shape(one)[0] % 128 for one in names[:-1])
    return False


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "minimax_m2", "qwen3_next", "qwen3_5_moe"])
def test_only_linear_layers_of_the_decoder(tmp_path, family):
    """Whatever else the source has in FP8: routers, gates of shared experts, multi-token prediction, towers."""
    more = ("mlp.gate.weight", "shared_expert_gate.weight", "fc.weight", "eh_proj.weight", "linear_fc1.weight")
    source = Checkpoint(write_fp8(build(family, tmp_path / "bf16"), tmp_path / "source", "deepseek", more))
    linear = {
        name
        for layer in range(source.layers)
        for name in source.layer(layer).plain
        if source.in_blocks(name) and not name.endswith(more) and not is_cut(source, name)
    }
    packed = packed_in_fp8(source.folder, tmp_path / "packed")
    assert packed.quantization and {f"{layer}.weight" for layer in packed.quantization.fp8} == linear
    in_fp8 = {name for name in packed.names if packed.stored(name).dtype == torch.float8_e4m3fn}
    assert in_fp8 == linear and all(name.startswith(f"{source.family.prefix}layers.") for name in linear)
    unpack(packed.folder, tmp_path / "unpacked")
    for name in (*linear, *source.copied):
        assert torch.equal(Checkpoint(tmp_path / "unpacked").stored(name), source.tensor(name))


def test_layers_of_linear_attention_are_quantized(tmp_path):
    names = fp8_weights(Checkpoint(build("qwen3_5_moe", tmp_path / "source")))
    kinds = {name.split("linear_attn.")[1] for name in names if "linear_attn." in name}
    assert kinds == {"in_proj_qkv.weight", "in_proj_z.weight", "out_proj.weight"}


def test_no_layer_that_fits(tmp_path):
    source = build("mixtral", tmp_path / "source", hidden_size=96, num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(Fp8Error, match=r"no linear layer outside experts has multiples of 128 .* drop --dense fp8"):
        fp8_weights(Checkpoint(source))


def test_unpack_writes_the_bf16_that_fp8_stands_for(tmp_path):
    packed = packed_in_fp8(qwen3(tmp_path / "source"), tmp_path / "packed")
    unpack(packed.folder, tmp_path / "unpacked")
    unpacked = Checkpoint(tmp_path / "unpacked")
    assert "quantization_config" not in unpacked.config
    for name in unpacked.names:
        if ".experts." not in name:
            assert torch.equal(unpacked.stored(name), packed.plain_tensor(name))


def test_by_the_command(tmp_path, capsys):
    source, out, text = qwen3(tmp_path / "source"), tmp_path / "packed", tmp_path / "text"
    text.write_text("It was the best of times. " * 200)
    options = "--calibration", text, "--samples", 2, "--sequence-length", 64, "--device", "cpu", "--dense", "fp8"
    assert puzzlemoe("compress", source, out, *options, "--dry-run") == 0
    planned = next(line for line in capsys.readouterr().out.splitlines() if "other weights" in line)
    assert puzzlemoe("compress", source, out, *options) == 0
    report = json.loads((out / "puzzlemoe_report.json").read_text())
    assert report["recipe"]["dense"] == "fp8"
    checkpoint, before = Checkpoint(out), Checkpoint(source)
    sizes = report["bytes"]
    assert sizes["other"] == checkpoint.stored_bytes(routed=False) < sizes["other_before"] == before.other_bytes
    capsys.readouterr()
    for words in (["inspect", out], ["perplexity", out, "--text", text, "--sequence-length", 64]):
        assert puzzlemoe(*words) == 0, capsys.readouterr()
    assert "every byte of every shard" in capsys.readouterr().out
    assert " -> " in planned


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda names: names[1:], "does not name its layer in fp8"),
        (lambda names: [], "does not name its layer in fp8"),
        (lambda names: [*names, "model.layers.9.self_attn.q_proj"], "has no model.layers.9.self_attn.q_proj.weight"),
        (lambda names: [*names, "model.layers.0.mlp.gate"], "has no model.layers.0.mlp.gate.weight_scale_inv"),
    ],
)
def test_config_json_names_the_layers_that_are(tmp_path, edit, message):
    packed = packed_in_fp8(qwen3(tmp_path / "source"), tmp_path / "packed")
    config = packed.config["quantization_config"]
    with pytest.raises(LayoutError, match=message):
        check_headers(packed.folder, parse_config(config | {"fp8": edit(config["fp8"])}))


def test_another_fp8_is_another_run(tmp_path):
    source = qwen3(tmp_path / "source")
    assert job_of(source, METHOD).fingerprint(None) != job_of(source, METHOD, dense="fp8").fingerprint(None)


def test_quantize():
    weights = torch.randn(256, 384).bfloat16()
    weights[:128, 128:256] = 0
    weights[128:, 256:] *= 2**20
    stored, scales = quantize(weights)
    assert stored.dtype == torch.float8_e4m3fn and scales.shape == (2, 3) and fp8_bytes((256, 384)) == 256 * 384 + 24
    back = dequantize(stored, scales, (128, 128))
    for rows, columns in ((i, j) for i in (0, 128) for j in (0, 128, 256)):
        block = weights[rows : rows + 128, columns : columns + 128].float()
        error = (back[rows : rows + 128, columns : columns + 128].float() - block).norm()
        assert error <= 0.03 * block.norm()
        assert torch.equal(largest(back, rows, columns), largest(weights, rows, columns))


def largest(weights: Tensor, rows: int, columns: int) -> Tensor:
    return weights[rows : rows + 128, columns : columns + 128].abs().max()
