"""Tiny random checkpoints of every supported family, under the tensor names that their hub checkpoints have.

Random, but not degenerate: experts and attention move the hidden state as much as the embedding does, so that a wrong
expert shows in the logits.  Routing is robust: the first `experts` dimensions of an embedding row hold the token's
router logits, a permutation of evenly spaced levels, and no layer writes to them, so that rounding never changes a
token's experts.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.model_configs import CONFIGS, END_ID, EXPERT_COUNT, text_config
from support.model_shapes import FLOAT32_ROUTERS, block, model_shapes, prefix, projections
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

END = "<|endoftext|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# These model types have no class in transformers: their checkpoints bring this file.
_CONFIGURATION = """from transformers import PretrainedConfig


class {name}(PretrainedConfig):
    model_type = "{family}"
"""

FUSED = {"qwen3_5_moe": ("experts.gate_up_proj", "experts.down_proj")} | {
    "granitemoe": ("input_linear.weight", "output_linear.weight")
}
"""Families whose hub checkpoints have all experts of a layer in two tensors, and how they name these."""


def build(family: str, folder: Path, *, fused: bool = False, seed: int = 0, **overrides: Any) -> Path:
    """Writes a bf16 checkpoint of `family` with a byte-level tokenizer and a chat template to `folder`; returns it.

    fused: all experts of a layer in `mlp.experts.gate_up_proj` and `down_proj`, as transformers holds them in memory.
    overrides: config.json fields, of the language model, that differ from `CONFIGS`.
    """
    config = {"model_type": family} | copy.deepcopy(CONFIGS[family])
    text_config(config).update(overrides)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(config, torch.Generator().manual_seed(seed))
    if family in FUSED:
        tensors = _fuse(tensors, config, block(family), FUSED[family])
    elif fused:
        tensors = _fuse(tensors, config, "mlp", ("experts.gate_up_proj", "experts.down_proj"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": END_ID, "eos_token_id": END_ID}))
    if reference := config.get("auto_map"):
        file, name = reference["AutoConfig"].split(".")
        (folder / f"{file}.py").write_text(_CONFIGURATION.format(name=name, family=family))
    _write_tokenizer(folder)
    return folder


def _tensors(config: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    family, text = config["model_type"], text_config(config)
    experts, hidden = text[EXPERT_COUNT[family]], text["hidden_size"]
    tensors = {name: _random(family, name, shape, experts, generator) for name, shape in model_shapes(config).items()}
    embedding = torch.randn(text["vocab_size"], hidden, generator=generator)
    levels = torch.linspace(-2, 2, experts)
    embedding[:, :experts] = torch.stack([levels[torch.randperm(experts, generator=generator)] for _ in embedding])
    tensors[f"{prefix(family)}embed_tokens.weight"] = embedding.bfloat16()
    return tensors


def _random(family: str, name: str, shape: tuple[int, ...], experts: int, generator: torch.Generator) -> Tensor:
    *_, kind, last = name.split(".")
    noise = torch.randn(shape, generator=generator)
    if last in ("e_score_correction_bias", "expert_bias"):
        return torch.linspace(-0.3, 0.3, experts)[torch.randperm(experts, generator=generator)].reshape(shape)
    if last == "A_log":
        return noise.abs().log1p()
    if kind in ("gate", "wg") or name.endswith("router.layer.weight"):
        return torch.eye(*shape) if family in FLOAT32_ROUTERS else torch.eye(*shape).bfloat16()
    if last in ("bias", "dt_bias"):
        return (0.1 * noise).bfloat16()
    if "norm" in kind or (kind == "0" and "norm" in name):
        # Qwen3-Next's norms multiply by 1 + weight, but for the gated one.
        zero_centred = family in ("qwen3_next", "qwen3_5_moe") and ".linear_attn." not in name
        return ((0 if zero_centred else 1) + 0.1 * noise).bfloat16()
    weight = noise * (shape[-1] if len(shape) > 1 else 1) ** -0.5
    if name == "lm_head.weight":
        weight *= 2
    if kind in ("o_proj", "out_proj", "down_proj", "w2"):
        # Of Phi's router both experts get weights near 1.
        weight *= 1 if kind in ("o_proj", "out_proj") else 1.5 if family == "phimoe" else 3
        weight[:experts] = 0
    return weight.bfloat16()


def _fuse(
    tensors: dict[str, Tensor], config: dict[str, Any], renamed: str, names: tuple[str, str]
) -> dict[str, Tensor]:
    """The same checkpoint with its blocks called `renamed`, and all experts of a layer in two tensors."""
    family = config["model_type"]
    experts, (gate, up, down) = text_config(config)[EXPERT_COUNT[family]], projections(family)
    plain = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    fused = {name.replace(f".{block(family)}.", f".{renamed}."): tensor for name, tensor in plain.items()}
    first = f".{block(family)}.experts.0.{gate}.weight"
    for layer in [name.removesuffix(first) for name in tensors if name.endswith(first)]:
        stacked = {
            name: torch.stack([tensors[f"{layer}.{block(family)}.experts.{e}.{name}.weight"] for e in range(experts)])
            for name in (gate, up, down)
        }
        fused[f"{layer}.{renamed}.{names[0]}"] = torch.cat([stacked[gate], stacked[up]], dim=1)
        fused[f"{layer}.{renamed}.{names[1]}"] = stacked[down]
    return fused


def _write_tokenizer(folder: Path) -> None:
    """One token per byte, and the end of text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: token for token, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 512}))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
