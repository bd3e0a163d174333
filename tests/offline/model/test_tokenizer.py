"""A tokenizer whose class does not do what its tokenizer.json says, as DeepSeek's first models have it."""

import json

import pytest
from support.models import build
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from puzzlemoe_offline.cli.main import app
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.families import FAMILIES
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.model.tokenizer import CONFIG, mended_config, tokenizer_of
from puzzlemoe_offline.model.weight_files import CheckpointError
from puzzlemoe_offline.run.card import serve_command

TEXT = "The quick brown fox\nhas 123 words,  doesn't it?\n"


def names_class(folder, name):
    config = json.loads((folder / CONFIG).read_text()) | {"tokenizer_class": name}
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.fixture
def misread(tmp_path):
    """A byte-level tokenizer that names Llama's class; the test is for nothing where transformers heeds the file."""
    folder = build("deepseek", tmp_path / "model")
    names_class(folder, "LlamaTokenizerFast")
    if decoded(AutoTokenizer.from_pretrained(folder, trust_remote_code=False)) == TEXT:
        pytest.skip("this transformers reads such a tokenizer as its file says")
    return folder


def decoded(tokenizer):
    return tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_its_file_is_what_counts(misread):
    tokenizer = tokenizer_of(misread)
    assert decoded(tokenizer) == TEXT
    assert tokenizer(TEXT)["input_ids"] == PreTrainedTokenizerFast.from_pretrained(misread)(TEXT)["input_ids"]


def test_what_a_server_loads_is_mended_and_how_to_serve_is_said(misread, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 50)
    out = tmp_path / "out"
    words = ["compress", misread, out, "--calibration", tmp_path / "text.txt", "--samples", 2, "--sequence-length", 32]
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 0, done.output
    assert f"vllm serve {out} --trust-remote-code" in done.output
    assert "vllm serve THIS_FOLDER --trust-remote-code\n" in (out / "README.md").read_text()
    served = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    assert decoded(served) == TEXT
    before, after = (json.loads((folder / CONFIG).read_text()) for folder in (misread, out))
    assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} == {"tokenizer_class"}


@pytest.mark.parametrize("family", ["mixtral", "deepseek"])
def test_others_stay_as_they_are(family, tmp_path):
    folder = build(family, tmp_path)
    assert mended_config(folder) == {}
    (folder / "tokenizer.json").write_text("{}")
    assert mended_config(folder) == {}
    with pytest.raises(CheckpointError, match=f"{folder}: its tokenizer could not be loaded"):
        tokenizer_of(folder)
    (folder / "tokenizer.json").unlink()
    assert mended_config(folder) == {}
    (folder / CONFIG).unlink()
    assert mended_config(folder) == {}


def test_deepseek_moe_with_yarn(tmp_path):
    """transformers has no configuration of that model, and fails over its rope_scaling where it reads it."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    folder = build("deepseek", tmp_path, rope_scaling=scaling)
    assert decoded(tokenizer_of(folder)) == TEXT
    assert LayerwiseModel(Checkpoint(folder), "cpu").model.model.rotary_emb.rope_type == "yarn"


def test_an_id_beyond_all_vocabularies(tmp_path):
    folder = build("mixtral", tmp_path)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["a"] = 2**31
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: token a has the id 2147483648"):
        tokenizer_of(folder)


def test_most_families_need_no_remote_code():
    assert serve_command("folder", FAMILIES["mixtral"]) == "vllm serve folder"
