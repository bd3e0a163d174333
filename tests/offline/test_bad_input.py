"""Input that cannot be used: one error that names the file or tensor, and nothing half-done is left that loads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from puzzlemoe_offline.calibrate import CalibrationError, load_calibration
from puzzlemoe_offline.checkpoint import Checkpoint, CheckpointError, locate
from puzzlemoe_offline.compress import Job, compress
from puzzlemoe_offline.families import UnsupportedModel
from puzzlemoe_offline.inspection import inspect
from puzzlemoe_offline.output import OutputError
from puzzlemoe_offline.recipe import Recipe
from puzzlemoe_offline.unpack import unpack
from puzzlemoe_vllm.format.codes import UnencodableWeight
from puzzlemoe_vllm.format.layout import LayoutError
from tests.tiny_models import build

EXPERT = "model.layers.1.mlp.experts.5.down_proj.weight"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensor(folder: Path, name: str, change) -> None:
    """Replaces a tensor by change(tensor), or drops it when that is None."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file({key: value for key, value in tensors.items() if value is not None}, path)
            return
    raise AssertionError(name)


def set_one(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 7] = value
        return tensor

    return change


def run(source: Path, out: Path) -> None:
    """A compression run without calibration."""
    compress(Job(Checkpoint(source), "source", None, Recipe(saliency="magnitude"), None, "cpu"), out, False, print)


@pytest.fixture
def source(tmp_path) -> Path:
    return build("qwen3_moe", tmp_path / "source")


@pytest.fixture
def packed(source, tmp_path) -> Path:
    run(source, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [EXPERT, "model.layers.1.mlp.gate.weight"])
def test_nan_in_the_source(source, tmp_path, name, value):
    edit_tensor(source, name, set_one(value))
    with pytest.raises(CheckpointError, match=f"{name}.*NaN or infinite"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    edit_tensor(source, name, set_one(0.0))


def test_a_weight_that_no_word_holds(source, tmp_path):
    edit_tensor(source, EXPERT, set_one(1e30))
    with pytest.raises(UnencodableWeight, match=r"layer 1, experts .* down projection: .* 130560"):
        run(source, tmp_path / "out")


def test_a_missing_tensor(source, tmp_path):
    edit_tensor(source, EXPERT, lambda tensor: None)
    with pytest.raises(CheckpointError, match=f"tensor {EXPERT} is missing"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_misshapen_tensor(source, tmp_path):
    edit_tensor(source, EXPERT, lambda tensor: tensor.T.contiguous())
    with pytest.raises(CheckpointError, match=rf"{EXPERT}: shape \(64, 128\), config.json says \(128, 64\)"):
        run(source, tmp_path / "out")


def test_a_quantized_source(source):
    edit_tensor(source, EXPERT, lambda tensor: tensor.to(torch.int8))
    with pytest.raises(CheckpointError, match=f"{EXPERT}: dtype torch.int8"):
        Checkpoint(source).expert(1, 5)
    edit_config(source, quantization_config={"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match="already quantized with 'fp8'; start from the 16-bit original"):
        Checkpoint(source)


def test_an_unknown_family_lists_the_known_ones(source):
    edit_config(source, model_type="llama")
    with pytest.raises(UnsupportedModel, match=r"'llama' is not supported.*Mixtral.*Qwen3-MoE.*DeepSeek-V2.*OLMoE"):
        Checkpoint(source)


def test_a_truncated_shard(source):
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut short"):
        Checkpoint(source)


def test_a_missing_shard(packed):
    (packed / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        Checkpoint(packed)


def test_no_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Checkpoint(tmp_path)


def test_a_name_that_is_neither_folder_nor_hub_id():
    with pytest.raises(CheckpointError, match="neither a folder here nor a model id"):
        locate("./no/such/folder/anywhere")


def test_packing_twice_and_unpacking_a_dense_model(packed, source, tmp_path):
    with pytest.raises(CheckpointError, match="packed already"):
        run(packed, tmp_path / "twice")
    with pytest.raises(CheckpointError, match="not a packed model"):
        unpack(Checkpoint(source), tmp_path / "unpacked")


def test_a_foreign_format_version(packed):
    quantization = json.loads((packed / "config.json").read_text())["quantization_config"]
    edit_config(packed, quantization_config=quantization | {"format_version": 9})
    with pytest.raises(LayoutError, match=r"config\.json.*format_version is 9.*upgrade puzzlemoe-vllm"):
        Checkpoint(packed)


def test_damage_that_inspect_finds(packed):
    name = "model.layers.0.mlp.experts.2.up_proj.puzzle"
    edit_tensor(packed, name, lambda words: words.view(torch.bfloat16))
    with pytest.raises(CheckpointError, match=f"{name}: dtype torch.bfloat16, mask16 words are torch.int16"):
        inspect(Checkpoint(packed))
    edit_tensor(packed, name, lambda words: None)
    with pytest.raises(CheckpointError, match="is missing"):
        inspect(Checkpoint(packed))


def test_an_output_folder_in_use(source, packed):
    with pytest.raises(OutputError, match="not empty"):
        run(source, packed)


def test_calibration_text_that_cannot_be_used(example, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(example / "model")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(CalibrationError, match="fewer than one window of 128"):
        load_calibration(str(short), tokenizer, 4, 128)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"body": "no text"}\n')
    with pytest.raises(CalibrationError, match=r'broken\.jsonl:2: expected a JSON object with a "text" field'):
        load_calibration(str(broken), tokenizer, 4, 128)
    with pytest.raises(CalibrationError, match=r"missing\.txt: not a file"):
        load_calibration(str(tmp_path / "missing.txt"), tokenizer, 4, 128)


def test_jsonl_and_text_give_the_same_windows(example, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(example / "model")
    text = (example / "calibration.txt").read_text()[:20_000]
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text(text)
    lines.write_text(json.dumps({"text": text}) + "\n")
    windows = [load_calibration(str(path), tokenizer, 4, 128).tokens for path in (plain, lines)]
    assert windows[0].shape == (4, 128)
    assert torch.equal(*windows)


def test_the_seed_chooses_one_window_from_each_part_of_a_file(example):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(example / "model")
    text = str(example / "calibration.txt")
    drawn = [load_calibration(text, tokenizer, 4, 128, seed).tokens for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    every = load_calibration(text, tokenizer, 10**6, 128).tokens
    assert torch.equal(every, load_calibration(text, tokenizer, 10**6, 128, 1).tokens)
    for windows in drawn:
        places = [int((every == window).all(dim=1).nonzero()[0]) for window in windows]
        assert [place * 4 // len(every) for place in places] == [0, 1, 2, 3]
