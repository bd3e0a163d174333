"""Which files and tensors of a folder are the model: none stale, foreign or outside; hostile values cost a line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import build
from support.runs import compress_pairs, unpack
from typer.testing import CliRunner

from puzzlemoe_offline.cli.main import app
from puzzlemoe_offline.model.checkpoint import OPEN_FILES, Checkpoint
from puzzlemoe_offline.model.families import expert_groups
from puzzlemoe_offline.model.hub import small_files
from puzzlemoe_offline.model.inspection import inspect
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.model.tokenizer import tokenizer_of
from puzzlemoe_offline.model.weight_files import CheckpointError
from puzzlemoe_offline.score.perplexity import perplexity
from puzzlemoe_vllm.errors import UserError
from puzzlemoe_vllm.format.layout import LayoutError
from puzzlemoe_vllm.format.shards import INDEX, has_digests

HEAD = "lm_head.weight"


@pytest.fixture
def source(tmp_path) -> Path:
    return build("qwen3_moe", tmp_path / "source")


@pytest.fixture
def packed(source, tmp_path) -> Path:
    compress_pairs(source, tmp_path / "packed")
    return tmp_path / "packed"


def refusal(read: Callable[[], object]) -> str:
    """The one line with which something is refused."""
    with pytest.raises(UserError) as error:
        read()
    text = str(error.value)
    assert len(text) <= 400 and text.isprintable(), text
    return text


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def split(folder: Path, index: bool = True) -> None:
    """Puts the tensors into two files, under an index or under numbered names alone."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        part = {name: tensor for name, tensor in tensors.items() if (name > "model.layers.1") == (number == 2)}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if index:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def add(path: Path, **tensors: torch.Tensor) -> None:
    save_file(load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize("index", [True, False])
def test_a_stale_duplicate_in_another_shard(source, index):
    split(source, index)
    assert len(Checkpoint(source).names) == len(load_file(source / "model-00001-of-00002.safetensors")) + len(
        load_file(source / "model-00002-of-00002.safetensors")
    )
    add(source / "model-00002-of-00002.safetensors", lm_head__weight=torch.zeros(257, 128).bfloat16())
    said = refusal(lambda: Checkpoint(source))
    assert "holds tensor lm_head.weight, which model-0000" in said and "one is stale" in said


def test_a_tensor_that_the_index_does_not_name(source):
    split(source)
    add(source / "model-00002-of-00002.safetensors", model__ghost=torch.zeros(1))
    assert "model-00002-of-00002.safetensors: holds tensor model.ghost, which" in refusal(lambda: Checkpoint(source))


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors", "other.safetensors"])
def test_other_weights_beside_the_one_file(source, tmp_path, name):
    before = Checkpoint(source).names
    save_file({"layers.0.attention.wq.weight": torch.ones(4, 4), HEAD: torch.zeros(257, 128)}, source / name)
    checkpoint = Checkpoint(source)
    assert checkpoint.names == before and bool(checkpoint.tensor(HEAD).any())
    compress_pairs(source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    }
    assert set(Checkpoint(tmp_path / "out").outside) == {HEAD, "model.embed_tokens.weight", "model.norm.weight"}


def test_numbered_files_without_an_index(source):
    split(source, index=False)
    save_file({"layers.0.attention.wq.weight": torch.ones(4, 4)}, source / "consolidated.safetensors")
    LayerwiseModel(Checkpoint(source), "cpu")
    (source / "model-00001-of-00002.safetensors").unlink()
    assert "model-00001-of-00002.safetensors is missing, of 2 such files" in refusal(lambda: Checkpoint(source))


@pytest.mark.parametrize(
    "name", ["model.foo.weight", "model.layers.0.self_attn.q_proj.bias", "model.layers.2.x.weight"]
)
def test_a_stray_tensor(source, name):
    path = source / "model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(4).bfloat16()}, path)
    assert f"model.safetensors: {name} is none of the tensors of a qwen3_moe of 2 layers" in refusal(
        lambda: inspect(Checkpoint(source))
    )


def test_frequencies_that_old_checkpoints_hold_are_let_be(source, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    path = source / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(16)}, path)
    compress_pairs(source, tmp_path / "out")
    assert Checkpoint(tmp_path / "out").tensor(name).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.bool])
def test_a_head_that_is_no_16_bit_float(source, dtype):
    path = source / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {HEAD: tensors[HEAD].float().to(dtype)}, path)
    assert f"{HEAD} in model.safetensors: dtype" in refusal(lambda: inspect(Checkpoint(source)))


@pytest.mark.parametrize("name", [HEAD, "model.norm.weight", "model.layers.0.self_attn.k_norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_inspect_finds_what_is_not_finite_outside_experts(source, name, value):
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path)
    assert f"{name} in model.safetensors holds NaN" in refusal(lambda: inspect(Checkpoint(source)))


def test_inspect_finds_any_damage_to_a_packed_model_and_says_what_it_did(packed):
    def last_line(*options: str) -> str:
        done = CliRunner().invoke(app, ["inspect", str(packed), *options], env={"COLUMNS": "300"})
        assert done.exit_code == 0, done.exception
        return done.output.splitlines()[-1]

    assert last_line().startswith("every byte of every shard is as it was written")
    assert last_line("--quick").startswith("headers checked, weights not read")
    for shard in sorted(packed.glob("*.safetensors")):
        whole = shard.read_bytes()
        for place in range(0, len(whole), len(whole) // 40):
            shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            assert shard.name in refusal(lambda: inspect(Checkpoint(packed)))
        shard.write_bytes(whole)
    assert inspect(Checkpoint(packed))["checked"] == "digests"


@pytest.mark.parametrize("quick", [True, False])
def test_inspect_says_which_small_files_were_edited(packed, quick):
    assert inspect(Checkpoint(packed), quick)["changed_files"] == []
    with (packed / "chat_template.jinja").open("a") as file:
        file.write("{# mine #}")
    (packed / "tokenizer_config.json").unlink()
    (packed / "README.md").write_text("mine")
    edit_config(packed, max_position_embeddings=256)
    (packed / "puzzlemoe_report.json").write_text("{}")
    changed = ["README.md", "chat_template.jinja", "config.json", "tokenizer_config.json"]
    assert inspect(Checkpoint(packed), quick)["changed_files"] == changed
    (packed / "README.md").unlink()
    assert inspect(Checkpoint(packed), quick)["changed_files"] == changed[1:]
    words = ["inspect", str(packed), *(["--quick"] if quick else [])]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "300"})
    assert (
        done.exit_code == 0 and f"edited or gone since the model was written: {', '.join(changed[1:])}" in done.output
    )


@pytest.mark.parametrize("name", ["../source/config.json", "/etc/hostname", "a/../../b", "\0"])
def test_an_index_that_names_files_elsewhere(packed, name):
    index = json.loads((packed / INDEX).read_text())
    index["metadata"]["files"] = {name: "0" * 64}
    (packed / INDEX).write_text(json.dumps(index))
    said = refusal(lambda: inspect(Checkpoint(packed), quick=True))
    assert INDEX in said and "names" in said


def test_inspect_compares_a_dense_model_that_was_written_here_too(packed, source, tmp_path):
    assert inspect(Checkpoint(source))["checked"] == "values"
    unpack(packed, tmp_path / "dense")
    assert has_digests(tmp_path / "dense") and inspect(Checkpoint(tmp_path / "dense"))["checked"] == "digests"
    shard = tmp_path / "dense" / "model-00002-of-00003.safetensors"
    whole = bytearray(shard.read_bytes())
    whole[-1] ^= 1
    shard.write_bytes(whole)
    assert "model-00002-of-00003.safetensors: is damaged" in refusal(lambda: inspect(Checkpoint(tmp_path / "dense")))
    assert inspect(Checkpoint(tmp_path / "dense"), quick=True)["checked"] == "headers"


@pytest.mark.parametrize("merged", [{"0": 16, "1": 8}, {"0": 8, "1": 8, "99": 2}, {"0": 6, "1": 8}])
def test_pairs_that_are_not_there(packed, merged):
    quantization = json.loads((packed / "config.json").read_text())["quantization_config"]
    edit_config(packed, quantization_config=quantization | {"merged_experts": merged})
    with pytest.raises(LayoutError):
        Checkpoint(packed)


def replace_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink(missing_ok=True)
        make(path)

    return change


CHANGES: dict[str, Callable[[Path], None]] = {
    "directory": replace_by(Path.mkdir),
    "fifo": replace_by(os.mkfifo),
    "deep": lambda path: path.write_bytes(b"[" * 200_000) and None,
    "deep objects": lambda path: path.write_bytes(b'{"a":' * 200_000) and None,
    "zero": replace_by(lambda path: path.symlink_to("/dev/zero")),
    "passwd": replace_by(lambda path: path.symlink_to("/etc/passwd")),
    "circle": replace_by(lambda path: path.symlink_to(path)),
    "pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n") and None,
}


@pytest.mark.parametrize("file", ["config.json", INDEX, "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("change", CHANGES)
def test_files_that_are_not_what_their_names_say(source, file, change):
    CHANGES[change](source / file)

    def read() -> None:
        LayerwiseModel(Checkpoint(source), "cpu")
        tokenizer_of(source)

    assert file in refusal(read) or change == "circle" or file.startswith("tokenizer")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": ["qwen3_moe"]},
        {"model_type": "x" * 5000},
        {"hidden_act": ["silu"] * 1000},
        {"num_hidden_layers": 65_536},
        {"num_hidden_layers": 10**300},
        {"num_experts": 2**31},
        {"hidden_size": 2**40},
        {"head_dim": 2**40},
        {"vocab_size": 2**50},
        {"num_attention_heads": 2**31},
        {"num_experts_per_tok": 9},
        {"num_experts_per_tok": True},
        {"quantization_config": "x" * 10_000},
        {"quantization_config": {"quant_method": "x" * 10_000}},
        {"num_experts": "8" * 10_000},
    ],
)
def test_hostile_values_of_config_json(source, changes):
    edit_config(source, **changes)
    began = time.monotonic()
    refusal(lambda: LayerwiseModel(Checkpoint(source), "cpu"))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("groups", ["four", -1, [4], 2.5])
def test_a_number_of_groups_that_is_none(tmp_path, groups):
    source = build("deepseek_v2", tmp_path / "source")
    edit_config(source, n_group=groups)
    refusal(lambda: compress_pairs(source, tmp_path / "out"))
    assert "n_group is" in refusal(lambda: expert_groups({"n_group": groups}))


def test_a_tensor_of_four_bits(source):
    path = source / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[HEAD] |= {"dtype": "F4", "shape": [257, 512]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert f"{HEAD} in model.safetensors: dtype F4" in refusal(lambda: inspect(Checkpoint(source)))


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.json", "chat_template.jinja", "LICENSE", "modeling_x.py"])
def test_no_small_file_is_read_from_outside(source, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    for words in (
        ["compress", source, tmp_path / "out"],
        ["inspect", source],
        ["perplexity", source, "--text", secret],
    ):
        done = CliRunner().invoke(app, list(map(str, words)))
        assert f"{name}: is a link to a file outside the model folder" in str(done.exception)
    assert "link to a file outside" in refusal(lambda: tokenizer_of(source))
    assert not (tmp_path / "out").exists()


def test_small_files_leave_out_what_belongs_to_other_weights(source):
    for name in ("pytorch_model.bin.index.json", "adapter_config.json", "LICENSE"):
        (source / name).write_text("{}")
    (source / "LICENSES").mkdir()
    (source / "README.txt").symlink_to("LICENSE")
    assert [path.name for path in small_files(source)] == [
        "LICENSE",
        "README.txt",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_a_tied_head_that_is_another(tmp_path, family):
    source = build(family, tmp_path / "source")
    edit_config(source, tie_word_embeddings=True)
    assert "config.json ties the head to the embedding, but lm_head.weight is another" in refusal(
        lambda: LayerwiseModel(Checkpoint(source), "cpu")
    )
    tensors = load_file(source / "model.safetensors")
    scores = []
    for head in ({HEAD: tensors["model.embed_tokens.weight"].clone()}, {}):
        save_file({name: t for name, t in tensors.items() if name != HEAD} | head, source / "model.safetensors")
        model = LayerwiseModel(Checkpoint(source), "cpu")
        scores.append(perplexity(model, torch.arange(64).view(2, 32)).perplexity)
    assert scores[0] == scores[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_everything_is_written_in_bf16(source, tmp_path, dtype):
    path = source / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    compress_pairs(source, tmp_path / "packed", sparsity=0.25)
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    for folder in ("packed", "unpacked"):
        checkpoint = Checkpoint(tmp_path / folder)
        dtypes = {checkpoint.tensor(name).dtype for name in checkpoint.names if not name.endswith(".puzzle")}
        assert dtypes == {torch.bfloat16}
        assert (checkpoint.config["dtype"], checkpoint.config["torch_dtype"]) == ("bfloat16", "bfloat16")
        assert checkpoint.other_bytes == sum(
            checkpoint.nbytes(name) for name in checkpoint.names if ".experts." not in name
        )
    assert Checkpoint(source).other_bytes == checkpoint.other_bytes


def test_values_that_bf16_cannot_hold(source, tmp_path):
    path = source / "model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    tensors["model.norm.weight"][3] = torch.finfo(torch.float32).max
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight in model\.safetensors holds values too large"):
        compress_pairs(source, tmp_path / "out")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not say which files are mapped")
def test_files_that_were_read_do_not_stay_mapped(source):
    tensors = list(load_file(source / "model.safetensors").items())
    (source / "model.safetensors").unlink()
    for number in range(2 * OPEN_FILES):
        save_file(dict(tensors[number :: 2 * OPEN_FILES]), source / f"part-{number}.safetensors")

    def mapped() -> set[str]:
        return {
            line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if f"{source}/part-" in line
        }

    checkpoint = Checkpoint(source)
    for name, tensor in tensors:  # one after the other, as they lie in different files
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert 1 <= len(mapped()) <= OPEN_FILES
    held = checkpoint.tensor(tensors[0][0])
    for name, _ in tensors[1:]:
        checkpoint.tensor(name)
    assert torch.equal(held, tensors[0][1])  # a tensor outlives its file's turn
    del held
    checkpoint.close()
    assert not mapped()
    assert torch.equal(checkpoint.tensor(tensors[0][0]), tensors[0][1])
