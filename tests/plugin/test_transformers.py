"""`import puzzlemoe_vllm.transformers`: packed folders through from_pretrained, equal to the unpacked ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engine import PROMPTS
from support.fp8 import write_fp8
from support.model_configs import CONFIGS
from support.models import build
from support.runs import run_method, unpack
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from puzzlemoe_offline.methods.pairs import PairMethod
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_vllm.format.layout import QUANT_METHOD, LayoutError
from puzzlemoe_vllm.transformers import logger  # the import registers the quantizer

FAMILIES = [family for family, config in CONFIGS.items() if "auto_map" not in config and family != "granitemoe"]

QUARTER = {"sparsity": "0.25", "code": "angle8"}

needs_no_vllm = pytest.mark.without_vllm


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)


def assert_equal(found, expected) -> None:
    """The same parameters, hence the same logits and greedy tokens."""
    tensors = expected.state_dict()
    assert found.state_dict().keys() == tensors.keys()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == tensors[name].dtype, name
        assert torch.equal(tensor, tensors[name]), name
    for prompt in PROMPTS[4:6]:
        tokens = torch.tensor([prompt])
        assert torch.equal(found(tokens).logits, expected(tokens).logits)
        greedy = {"max_new_tokens": 10, "do_sample": False}
        assert torch.equal(found.generate(tokens, **greedy), expected.generate(tokens, **greedy))


@pytest.fixture
def copy(models, tmp_path):
    """copy(family, **recipe): a packed folder that a test may damage."""

    def make(*arguments, **recipe) -> Path:
        return shutil.copytree(models(*arguments, **recipe).packed, tmp_path / "copy")

    return make


def edit_config(folder: Path, edit) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    edit(config)
    file.write_text(json.dumps(config))


def edit_tensors(folder: Path, edit) -> None:
    """Puts what `edit` returns for each shard's tensors in their place, and mends the index."""
    where = {}
    for shard in folder.glob("*.safetensors"):
        tensors = edit(load_file(shard))
        save_file(tensors, shard, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, shard.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@needs_no_vllm
@pytest.mark.parametrize(("family", "recipe"), [*((family, {}) for family in FAMILIES), ("deepseek_v3", QUARTER)])
def test_equals_the_unpacked_model(family, recipe, models):
    both = models(family, **recipe)
    assert_equal(load(both.packed), load(both.unpacked))


@needs_no_vllm
def test_a_family_whose_experts_are_stored_as_one_tensor_is_refused(models):
    with pytest.raises(LayoutError, match="layer 0, where GraniteMoeForCausalLM has none that transformers loads"):
        load(models("granitemoe").packed)


@needs_no_vllm
@pytest.mark.parametrize("code", ["angle16", "angle6", "mask6", "trellis5"])
def test_every_code(code, models):
    both = models("qwen3_moe", sparsity="0.25", code=code)
    assert_equal(load(both.packed), load(both.unpacked))


@needs_no_vllm
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_clusters(family, models):
    both = models(family, clusters=3)
    assert_equal(load(both.packed), load(both.unpacked))


@pytest.fixture
def in_fp8(tmp_path):
    """A tiny model with linear layers in FP8, packed, and unpacked; of DeepSeek and Qwen3-Next from an FP8 source, with
    blocks that are not whole."""

    def make(family: str) -> tuple[Path, Path]:
        source = build(family, tmp_path / "source", hidden_size=256)
        if family not in ("mixtral", "qwen3_moe"):
            source = write_fp8(source, tmp_path / "fp8", "deepseek")
        run_method(source, tmp_path / "packed", PairMethod(PairRecipe(saliency="magnitude")), dense="fp8")
        unpack(tmp_path / "packed", tmp_path / "unpacked")
        return tmp_path / "packed", tmp_path / "unpacked"

    return make


@needs_no_vllm
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "qwen3_next", "qwen3_5_moe"])
def test_linear_layers_in_fp8(family, in_fp8):
    packed, unpacked = in_fp8(family)
    assert json.loads((packed / "config.json").read_text())["quantization_config"]["fp8"]
    assert_equal(load(packed), load(unpacked))


@needs_no_vllm
def test_layers_in_fp8_that_the_model_lacks_are_refused(in_fp8):
    packed, _ = in_fp8("mixtral")
    edit_config(packed, lambda config: config["quantization_config"]["fp8"].append("model.layers.0.self_attn.x_proj"))
    with pytest.raises(LayoutError, match=r"x_proj\.weight in fp8, which is no linear layer of the model"):
        load(packed)


@needs_no_vllm
@pytest.mark.parametrize("kept", [0, 1])
def test_layers_in_fp8_that_config_json_does_not_name_are_refused(kept, in_fp8):
    packed, _ = in_fp8("mixtral")

    def drop(config) -> None:
        config["quantization_config"]["fp8"] = config["quantization_config"]["fp8"][:kept]

    edit_config(packed, drop)
    with pytest.raises(LayoutError, match=r"weight is F8_E4M3 .*config.json was edited|weight_scale_inv belongs to no"):
        load(packed)


@needs_no_vllm
def test_layers_without_experts_and_tied_embeddings(models):
    both = models("qwen3_moe", mlp_only_layers=[0], tie_word_embeddings=True)
    assert_equal(load(both.packed), load(both.unpacked))


@needs_no_vllm
def test_tensors_outside_experts_in_another_dtype(copy, models):
    """They stay as the source has them; transformers casts all but the ones that it renames, such as this router."""
    folder = copy("mixtral")
    edit_tensors(folder, lambda tensors: {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in tensors.items()})
    assert_equal(load(folder), load(models("mixtral").unpacked))


@needs_no_vllm
@pytest.mark.parametrize("device_map", ["auto", "cpu", "disk"])
def test_device_maps(device_map, models, tmp_path):
    both = models("mixtral", code="angle6")
    expected = load(both.unpacked)
    if device_map == "disk":
        names = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
        device_map = {"model.layers.1": "disk"} | dict.fromkeys(names, "cpu")
    found = load(both.packed, device_map=device_map, offload_folder=tmp_path / "offload")
    tokens = torch.tensor([PROMPTS[5]])
    assert torch.equal(found(tokens).logits, expected(tokens).logits)


@needs_no_vllm
def test_the_loaded_model_is_an_ordinary_one(models, tmp_path):
    """It saves as the source family does, without a word of quantization, and may be cast."""
    both = models("mixtral")
    model = load(both.packed)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not config.keys() & {"quantization_config", "transformers_weights"}
    names = {name for shard in (tmp_path / "saved").glob("*.safetensors") for name in load_file(shard)}
    assert "model.layers.1.block_sparse_moe.experts.7.w2.weight" in names
    assert_equal(load(tmp_path / "saved"), load(both.unpacked))
    assert model.float().dtype == torch.float32


@needs_no_vllm
def test_one_line_says_that_experts_are_dense(models, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(logger, "warning", lines.append)
    load(models("mixtral").packed)
    (line,) = lines
    assert "experts are decoded to dense bfloat16" in line


@needs_no_vllm
def test_transformers_alone_stops_at_a_packed_folder(models, monkeypatch):
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, QUANT_METHOD)
    with pytest.raises(ValueError, match=r"`import puzzlemoe_vllm.transformers` first"):
        load(models("mixtral").packed)


PAIR = "model.layers.1.mlp.experts.2.up_proj.puzzle"


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def renamed(name, new):
    return lambda tensors: {new if n == name else n: t for n, t in tensors.items()}


def changed(name, change):
    return lambda tensors: {n: change(t).contiguous() if n == name else t for n, t in tensors.items()}


@needs_no_vllm
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without(PAIR), f"lacks {PAIR}"),
        (without(PAIR + "_grid"), f"lacks {PAIR}_grid"),
        (
            without("model.layers.1.mlp.experts.7.down_proj.weight"),
            "lacks model.layers.1.mlp.experts.7.down_proj.weight",
        ),
        (without("lm_head.weight"), "lacks lm_head.weight"),
        (renamed(PAIR, PAIR.replace(".2.", ".3.")), "experts.3.up_proj.puzzle belongs to no parameter"),
        (
            renamed(PAIR, "model.layers.1.mlp.experts.2.up_proj.weight"),
            "experts.2.up_proj.weight belongs to no parameter",
        ),
        (lambda tensors: tensors | {"foreign": torch.zeros(1)}, "foreign belongs to no parameter"),
        (lambda tensors: tensors | {"model.norm.weight": torch.ones(128)}, "model.norm.weight is in .*, too"),
        (changed(PAIR, lambda words: words[:, :64]), r"puzzle is U8 \[64, 64\], the model has U8 \[64, 128\]"),
        (changed(PAIR, lambda words: words.short()), r"puzzle is I16 \[64, 128\], the model has U8"),
        (changed(PAIR + "_grid", lambda steps: steps.float()), "is F32 .*, the model has BF16"),
        (changed("lm_head.weight", lambda head: head[:5]), r"lm_head.weight is BF16 \[5, 128\]"),
    ],
)
def test_files_that_do_not_fit_the_model_are_refused(edit, message, copy):
    folder = copy("qwen3_moe", sparsity="0.25", code="angle8")
    edit_tensors(folder, edit)
    with pytest.raises(LayoutError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)


@needs_no_vllm
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config["quantization_config"]["merged_experts"].update({"1": 10}), "has 10 experts in layer 1"),
        (lambda config: config["quantization_config"]["merged_experts"].update({"9": 2}), "lists .* layer 9"),
        (lambda config: config["quantization_config"].update(format_version=9), "upgrade puzzlemoe-vllm"),
        (lambda config: config["quantization_config"].update(code="angle6", group_size=128), "the model has"),
        (lambda config: config.update(num_experts=4), "has 8 experts in layer 0, but the model has 4"),
        (lambda config: config.update(num_hidden_layers=1), "layer 1"),
    ],
)
def test_edited_configs_are_refused(edit, message, copy):
    folder = copy("qwen3_moe", code="angle8")
    edit_config(folder, edit)
    with pytest.raises(LayoutError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value) or "format_version" in str(error.value)


@needs_no_vllm
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float16}, "bfloat16, not torch.float16: load with dtype=torch.bfloat16"),
        ({"dtype": torch.float32}, "bfloat16, not torch.float32"),
        ({"tp_plan": "auto"}, "cannot load a packed model in parallel"),
    ],
)
def test_options_that_cannot_be_had(options, message, models):
    with pytest.raises(LayoutError, match=message):
        load(models("mixtral").packed, **options)


@needs_no_vllm
def test_a_class_without_the_head_is_refused(models):
    with pytest.raises(LayoutError, match="belongs to no parameter of MixtralModel"):
        AutoModel.from_pretrained(models("mixtral").packed)


MODELING = """
import torch
from transformers import PreTrainedModel
from .configuration_deepseek import DeepseekConfig


class DeepseekForCausalLM(PreTrainedModel):
    config_class = DeepseekConfig

    def __init__(self, config):
        super().__init__(config)
        self.head = torch.nn.Linear(2, 2)
        self.post_init()
"""


@needs_no_vllm
def test_model_code_that_a_checkpoint_brings_is_refused(copy):
    """transformers has no DeepSeek-MoE; hub checkpoints bring the class, whose experts are modules of their own."""
    folder = copy("deepseek")
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        load(folder, trust_remote_code=True)
    (folder / "modeling_deepseek.py").write_text(MODELING)
    causal = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"}
    edit_config(folder, lambda config: config["auto_map"].update(causal))
    with pytest.raises(LayoutError, match=r"where DeepseekForCausalLM has none .*: `puzzlemoe unpack` the model"):
        load(folder, trust_remote_code=True)
