"""Input that cannot be used: one error that names the file or tensor, and nothing half-done is left that loads."""

import json
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file
from support.models import build
from support.runs import compress_pairs, unpack
from transformers import AutoTokenizer
from typer.testing import CliRunner

from puzzlemoe_offline.cli.main import app, main
from puzzlemoe_offline.methods.base import MethodError
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.families import UnsupportedModel
from puzzlemoe_offline.model.fp8 import Fp8Error
from puzzlemoe_offline.model.hub import locate
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.model.other_formats import ForeignFormat
from puzzlemoe_offline.model.tokenizer import tokenizer_of
from puzzlemoe_offline.model.weight_files import CheckpointError
from puzzlemoe_offline.run.output import OutputError
from puzzlemoe_offline.score.perplexity import perplexity
from puzzlemoe_vllm.errors import UserError
from puzzlemoe_vllm.format.codes import UnencodableWeight
from puzzlemoe_vllm.format.headers import read_header
from puzzlemoe_vllm.format.layout import LayoutError

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
    compress_pairs(source, out)


@pytest.fixture
def source(tmp_path) -> Path:
    return build("qwen3_moe", tmp_path / "source")


@pytest.fixture
def packed(source, tmp_path) -> Path:
    run(source, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [EXPERT, "model.layers.1.mlp.gate.weight", "model.embed_tokens.weight"])
def test_nan_in_the_source(source, tmp_path, name, value):
    edit_tensor(source, name, set_one(value))
    with pytest.raises(CheckpointError, match=f"{name}.*NaN or infinite"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    edit_tensor(source, name, set_one(0.0))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"])
def test_nan_that_a_forward_pass_meets(source, name):
    edit_tensor(source, name, set_one(float("nan")))
    windows = torch.randint(0, 200, (2, 16))
    with pytest.raises(CheckpointError, match=f"{name} .*NaN or infinite"):
        perplexity(LayerwiseModel(Checkpoint(source), "cpu"), windows)


def test_a_weight_that_no_word_holds(source, tmp_path):
    edit_tensor(source, EXPERT, set_one(1e30))
    with pytest.raises(UnencodableWeight, match=r"layer 1, experts .* down projection: .* 130560"):
        run(source, tmp_path / "out")


# Of each kind: an expert's, a router's, one that no calibration pass reads, one of a layer without calibration.
@pytest.mark.parametrize(
    "name",
    [EXPERT, "model.layers.1.mlp.gate.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"],
)
def test_a_missing_tensor(source, tmp_path, name):
    edit_tensor(source, name, lambda tensor: None)
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layer_without_its_experts(source, tmp_path):
    path = source / "model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if ".1.mlp.experts." not in name}, path)
    with pytest.raises(CheckpointError, match=r"layer 1 has no expert tensors"):
        run(source, tmp_path / "out")


def test_a_tensor_that_only_the_index_has(source):
    weight_map = dict.fromkeys([*load_file(source / "model.safetensors"), "model.ghost"], "model.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"model\.ghost is missing, but .*index\.json names it"):
        Checkpoint(source)


def test_experts_that_the_config_does_not_know(source, tmp_path):
    edit_config(source, num_experts=6)
    with pytest.raises(CheckpointError, match=r"gate\.weight: shape \(8, 128\), config.json says \(6, 128\)"):
        run(source, tmp_path / "out")
    path = source / "model.safetensors"
    shorter = {name: t[:6].clone() if name.endswith(".mlp.gate.weight") else t for name, t in load_file(path).items()}
    save_file(shorter, path)
    with pytest.raises(CheckpointError, match=r"experts\.6\.down_proj\.weight is none of the tensors .* 6 experts"):
        run(source, tmp_path / "out")


def test_an_expert_with_a_bias(source, tmp_path):
    path, name = source / "model.safetensors", EXPERT.replace("weight", "bias")
    save_file(load_file(path) | {name: torch.ones(128)}, path)
    with pytest.raises(CheckpointError, match=f"{name} is none of the tensors"):
        run(source, tmp_path / "out")


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "moe_intermediate_size", "num_experts"])
@pytest.mark.parametrize("value", [None, "two"])
def test_a_size_that_is_missing_or_no_number(source, tmp_path, key, value):
    edit_config(source, **{key: value})
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is {value!r}, expected a positive number"):
        run(source, tmp_path / "out")


@pytest.mark.parametrize("content", [b'"text"', b"[]", b"\xff\xfe{", b'{"a'])
def test_a_config_that_is_no_json_object(source, content):
    (source / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: is not"):
        Checkpoint(source)


def test_an_index_without_files(source):
    (source / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index\.json: has no weight_map"):
        Checkpoint(source)


def test_a_misshapen_tensor(source, tmp_path):
    edit_tensor(source, EXPERT, lambda tensor: tensor.T.contiguous())
    with pytest.raises(CheckpointError, match=rf"{EXPERT}: shape \(64, 128\), config.json says \(128, 64\)"):
        run(source, tmp_path / "out")


def test_a_quantized_source(source):
    edit_tensor(source, EXPERT, lambda tensor: tensor.to(torch.int8))
    with pytest.raises(CheckpointError, match=f"{EXPERT} in .*: dtype I8 is not bf16"):
        Checkpoint(source).expert(1, 5)
    attention = "model.layers.0.self_attn.q_proj.weight"
    edit_tensor(source, attention, lambda tensor: tensor.to(torch.float8_e4m3fn))
    with pytest.raises(CheckpointError, match=f"{attention} in .*: dtype F8_E4M3 is not bf16.*16-bit original"):
        Checkpoint(source).plain_tensor(attention)
    edit_config(source, quantization_config=["fp8"])
    with pytest.raises(ForeignFormat, match=r"quantization_config is \['fp8'\], expected a JSON object"):
        Checkpoint(source)
    edit_config(source, quantization_config={"quant_method": "fp8"})
    with pytest.raises(Fp8Error, match=f"{attention} is FP8, but its scale .* is missing"):
        Checkpoint(source)


def test_an_unknown_family_lists_the_known_ones(source):
    edit_config(source, model_type="llama")
    with pytest.raises(UnsupportedModel, match=r"'llama' is not supported.*mixtral, qwen3_moe.*deepseek_v2.*olmoe"):
        Checkpoint(source)


def test_experts_without_silu(source):
    edit_config(source, hidden_act="gelu")
    with pytest.raises(UnsupportedModel, match=r"hidden_act 'gelu' in config\.json is not supported"):
        Checkpoint(source)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gpt_oss", r"4\.25 bits a weight already"),
        ("llama4", "router's weights multiply the experts' inputs"),
        ("llama4_text", "router's weights multiply the experts' inputs"),
        ("gemma4", "gated by GELU"),
        ("nemotron_h", "no gate projection"),
    ],
)
def test_families_that_words_do_not_suit_are_told_what_to_use_instead(source, model_type, reason):
    edit_config(source, model_type=model_type)
    with pytest.raises(UnsupportedModel, match=f"'{model_type}' is not supported: .*{reason}.*: (use|serve)"):
        Checkpoint(source)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen3_moe", {"swiglu_limit": 7.0}, "swiglu_limit 7.0 in config.json is not supported: its experts clamp"),
        ("qwen3_moe", {"mlp_bias": True}, "mlp_bias True .* biases"),
        ("qwen3_moe", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' .* known with 'softmax'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax' .* known with 'sigmoid'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method 'greedy'"),
        ("glm4_moe", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("minimax_m2", {"use_routing_bias": False}, "use_routing_bias False"),
        ("lfm2_moe", {"use_expert_bias": False}, "use_expert_bias False"),
        ("phimoe", {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1"),
        ("qwen3_5_moe", {"swiglu_limit": 7.0}, "swiglu_limit 7.0"),
    ],
)
def test_routing_or_an_activation_that_a_family_does_not_have(tmp_path, family, changes, words):
    source = build(family, tmp_path, **changes)
    with pytest.raises(UnsupportedModel, match=words):
        Checkpoint(source)


def test_a_nested_config_that_is_none(tmp_path):
    source = build("qwen3_5_moe", tmp_path)
    edit_config(source, text_config="small")
    with pytest.raises(UnsupportedModel, match=r"text_config of .* is 'small' in config.json, expected a JSON object"):
        Checkpoint(source)


def test_layers_of_different_numbers_of_chosen_experts(tmp_path):
    source = build("hunyuan_v1_moe", tmp_path, moe_topk=[2, 3])
    with pytest.raises(CheckpointError, match=r"moe_topk is \[2, 3\], expected a positive number"):
        Checkpoint(source)


def test_layers_beyond_the_last_that_are_not_for_multi_token_prediction(tmp_path):
    source = build("glm4_moe", tmp_path, num_nextn_predict_layers=0)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.3.enorm.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.\S+ is none of the tensors of a glm4_moe"):
        LayerwiseModel(Checkpoint(source), "cpu")


def test_layers_that_config_says_are_dense(tmp_path):
    source = build("glm4_moe", tmp_path)
    edit_config(source, first_k_dense_replace=2)
    with pytest.raises(CheckpointError, match=r"layer 1 has expert tensors, but config\.json says that it has none"):
        LayerwiseModel(Checkpoint(source), "cpu")


@pytest.mark.parametrize("changes", [{"rope_scaling": {"rope_type": "none", "factor": 2}}, {"rms_norm_eps": "small"}])
def test_a_config_that_transformers_does_not_know(source, tmp_path, changes):
    edit_config(source, **changes)
    with pytest.raises(CheckpointError, match=r"config\.json: transformers makes no model of it \(\w+:") as caught:
        run(source, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_tokens_of_another_model(source):
    with pytest.raises(CheckpointError, match="token 300, but the embedding has 257 rows"):
        LayerwiseModel(Checkpoint(source), "cpu").embed(torch.tensor([[5, 300]]))


def test_a_truncated_shard(source):
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors: has .* bytes of tensors, its header says"):
        Checkpoint(source)


def test_a_missing_shard(packed):
    (packed / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors: is missing"):
        Checkpoint(packed)


def test_no_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Checkpoint(tmp_path)


def test_a_name_that_is_neither_folder_nor_hub_id():
    with pytest.raises(CheckpointError, match="neither a folder here nor a model id"):
        locate("./no/such/folder/anywhere")


def test_a_gated_model_is_told_from_a_missing_one(monkeypatch):
    def gated(*_, **__):
        raise GatedRepoError("403", response=httpx.Response(403, request=httpx.Request("GET", "https://hub")))

    monkeypatch.setattr("puzzlemoe_offline.model.hub.snapshot_download", gated)
    with pytest.raises(CheckpointError, match=r"owner/model: .*accepted its terms.*hf auth login"):
        locate("owner/model")


def test_too_few_experts_for_a_quarter(tmp_path):
    source = build("mixtral", tmp_path / "source", num_local_experts=3)
    with pytest.raises(MethodError, match=r"--sparsity 0.25: half of the 3 experts .* use --sparsity 0.5"):
        compress_pairs(source, tmp_path / "out", sparsity=0.25)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_model_without_tokenizer(tmp_path, family):
    source = build(family, tmp_path)
    for path in source.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"its tokenizer (has no vocabulary|could not be loaded)") as caught:
        tokenizer_of(source)
    assert "\n" not in str(caught.value)


def test_packing_twice_and_unpacking_a_dense_model(packed, source, tmp_path):
    with pytest.raises(MethodError, match="packed already"):
        run(packed, tmp_path / "twice")
    planned = CliRunner().invoke(app, ["compress", str(packed), str(tmp_path / "twice"), "--dry-run"])
    assert isinstance(planned.exception, MethodError) and "packed already" in str(planned.exception)
    with pytest.raises(MethodError, match="not a packed model"):
        unpack(source, tmp_path / "unpacked")


def test_a_foreign_format_version(packed):
    quantization = json.loads((packed / "config.json").read_text())["quantization_config"]
    edit_config(packed, quantization_config=quantization | {"format_version": 9})
    with pytest.raises(LayoutError, match=r"config\.json.*format_version is 9.*upgrade puzzlemoe-vllm"):
        Checkpoint(packed)


def test_a_packed_folder_that_was_changed(packed):
    name = "model.layers.0.mlp.experts.2.up_proj.puzzle"
    edit_tensor(packed, name, lambda words: words.view(torch.bfloat16))
    with pytest.raises(LayoutError, match=r"model-00001-of-00003\.safetensors: is no shard of a packed model"):
        Checkpoint(packed)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.mlp.experts.2.up_proj.puzzle", "model.layers.0.mlp.experts.0.gate_proj.puzzle", "lm_head.weight"],
)
def test_a_tensor_that_a_packed_folder_lacks(packed, name):
    file = json.loads((packed / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors, metadata = load_file(packed / file), read_header(packed / file).metadata
    del tensors[name]
    save_file(tensors, packed / file, metadata=metadata)
    with pytest.raises(LayoutError, match=f"{name} is missing"):
        Checkpoint(packed)
    (packed / "model.safetensors.index.json").unlink()
    with pytest.raises(LayoutError, match=r"index\.json: is missing"):
        Checkpoint(packed)


def test_an_output_folder_in_use(source, packed):
    with pytest.raises(OutputError, match="not empty"):
        run(source, packed)


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Writing beyond that many bytes of a file fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_output_folder_that_cannot_be_written(source, packed, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "out"):
        with pytest.raises(OutputError, match=f"{out} cannot be written .*Not a directory"):
            run(source, out)
    with files_up_to(20_000), pytest.raises(OutputError, match=r"cannot be written .*File too large"):
        run(source, tmp_path / "out")
    with pytest.raises(OutputError, match="unfinished run: go on with --resume, name a new folder or"):
        unpack(packed, tmp_path / "out")


def test_a_disk_without_room(source, tmp_path, monkeypatch):
    text, out = tmp_path / "text.txt", tmp_path / "deep" / "out"
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    words = [str(word) for word in ("compress", source, out, "--calibration", text, "--sequence-length", 64)]
    planned = CliRunner().invoke(app, [*words, "--dry-run"]).output
    assert re.search(r"disk\W+\d+\.\d MB", planned)
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2000, 1000, 1000))
    failed = CliRunner().invoke(app, words)
    assert re.search(rf"{out}: the run writes up to .* MB, and its disk has 1\.0 kB left", str(failed.exception))
    assert not out.parent.exists()


def test_small_files_of_the_source(source, tmp_path):
    (source / "LICENSES").mkdir()
    (source / "LICENSE").write_text("free")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    run(source, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert not (tmp_path / "out" / "LICENSES").exists()
    ours, theirs = (AutoTokenizer.from_pretrained(folder).chat_template for folder in (tmp_path / "out", source))
    assert ours == theirs and set(ours) == {"default", "tools"}


@pytest.mark.parametrize(("content", "message"), [(b"", "fewer than two tokens"), (b"\xe9", "UTF-8")])
def test_a_text_that_cannot_be_scored(source, tmp_path, content, message, capsys, monkeypatch):
    folder = tmp_path / "[a]" / ("long-" * 16)
    folder.mkdir(parents=True)
    text = folder / "text.txt"
    text.write_bytes(content)
    monkeypatch.setattr("sys.argv", ["puzzlemoe", "perplexity", str(source), "--text", str(text)])
    with pytest.raises(SystemExit):
        main()
    # One line, though it is longer than a terminal's, with brackets as they are.
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "[a]" in line and "text.txt" in line and message in line
    assert len(line) <= 400
