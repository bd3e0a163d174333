"""Tiny random checkpoints of every supported family, under the tensor names that their hub checkpoints have.

Random, but not degenerate: experts and attention move the hidden state as much as the embedding does, so that a wrong
expert shows in the logits.  Routing is robust: the first `experts` dimensions of an embedding row hold the token's
router logits, a permutation of evenly spaced levels, and no layer writes to them, so that rounding never changes a
token's experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

END = "<|endoftext|>"
END_ID = 256
VOCABULARY = 257

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": END_ID,
    "eos_token_id": END_ID,
    "hidden_act": "silu",
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

_DEEPSEEK: dict[str, Any] = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_key_value_heads": 4,
    "scoring_func": "softmax",
    "attention_bias": False,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": _COMMON
    | {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 8,
        "intermediate_size": 96,
        "sliding_window": None,
    },
    "qwen3_moe": _COMMON
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 32,
        "num_experts": 8,
        "intermediate_size": 192,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    },
    "qwen2_moe": _COMMON
    | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": 8,
        "intermediate_size": 192,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    },
    "deepseek_v2": _COMMON
    | _DEEPSEEK
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "num_experts_per_tok": 3,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
    },
    "deepseek": _COMMON
    | _DEEPSEEK
    | {
        "architectures": ["DeepseekForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
        "num_experts_per_tok": 3,
    },
    "olmoe": _COMMON
    | {
        "architectures": ["OlmoeForCausalLM"],
        "num_experts": 8,
        "intermediate_size": 64,
        "norm_topk_prob": False,
        "clip_qkv": None,
        "attention_bias": False,
    },
}
"""config.json by family, without model_type; the keys that the family's hub checkpoints have."""

EXPERT_COUNT = {
    "mixtral": "num_local_experts",
    "qwen3_moe": "num_experts",
    "qwen2_moe": "num_experts",
    "deepseek_v2": "n_routed_experts",
    "deepseek": "n_routed_experts",
    "olmoe": "num_experts",
}
"""The config.json key of a family's number of routed experts."""

# DeepSeek-MoE has no class in transformers: its checkpoints bring this file.
_DEEPSEEK_CONFIGURATION = """from transformers import PretrainedConfig


class DeepseekConfig(PretrainedConfig):
    model_type = "deepseek"
"""


def build(family: str, folder: Path, *, fused: bool = False, seed: int = 0, **overrides: Any) -> Path:
    """Writes a bf16 checkpoint of `family` with a byte-level tokenizer and a chat template to `folder`; returns it.

    fused: all experts of a layer in `mlp.experts.gate_up_proj` and `down_proj`, as transformers holds them in memory.
    overrides: config.json fields that differ from `CONFIGS`.
    """
    config = {"model_type": family} | CONFIGS[family] | overrides
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(config, torch.Generator().manual_seed(seed))
    save_file(_fuse(tensors, config) if fused else tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": END_ID, "eos_token_id": END_ID}))
    if family == "deepseek":
        (folder / "configuration_deepseek.py").write_text(_DEEPSEEK_CONFIGURATION)
    _write_tokenizer(folder)
    return folder


def _tensors(config: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    hidden, experts = config["hidden_size"], config[EXPERT_COUNT[config["model_type"]]]
    tensors = {
        name: _random(name, shape, experts, generator)
        for layer in range(config["num_hidden_layers"])
        for name, shape in _layer_shapes(config, layer).items()
    }
    embedding = torch.randn(VOCABULARY, hidden, generator=generator)
    levels = torch.linspace(-2, 2, experts)
    embedding[:, :experts] = torch.stack([levels[torch.randperm(experts, generator=generator)] for _ in embedding])
    tensors["model.embed_tokens.weight"] = embedding.bfloat16()
    tensors["model.norm.weight"] = _random("model.norm.weight", (hidden,), experts, generator)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = 2 * _random("lm_head.weight", (VOCABULARY, hidden), experts, generator)
    return tensors


def _random(name: str, shape: tuple[int, ...], experts: int, generator: torch.Generator) -> Tensor:
    kind = name.rsplit(".", 2)[-2]
    if name.endswith(".mlp.gate.weight") or name.endswith(".block_sparse_moe.gate.weight"):
        return torch.eye(*shape).bfloat16()
    if "norm" in kind:
        return (1 + 0.1 * torch.randn(shape, generator=generator)).bfloat16()
    if name.endswith(".bias"):
        return (0.1 * torch.randn(shape, generator=generator)).bfloat16()
    weight = torch.randn(shape, generator=generator) * shape[1] ** -0.5
    if kind in ("o_proj", "down_proj", "w2"):
        weight *= 1 if kind == "o_proj" else 3
        weight[:experts] = 0
    return weight.bfloat16()


def _layer_shapes(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    hidden = config["hidden_size"]
    shapes = _mla_shapes(config) if config["model_type"] == "deepseek_v2" else _attention_shapes(config)
    shapes |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if layer < config.get("first_k_dense_replace", 0) or layer in config.get("mlp_only_layers", ()):
        shapes |= _mlp_shapes("mlp", hidden, config["intermediate_size"])
    else:
        shapes |= _moe_shapes(config)
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def _attention_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, family = config["hidden_size"], config["model_type"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
    }
    if family == "qwen2_moe":
        shapes |= {f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", query), ("k", key), ("v", key))}
    if family == "qwen3_moe":
        shapes |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    if family == "olmoe":
        shapes |= {"self_attn.q_norm.weight": (query,), "self_attn.k_norm.weight": (key,)}
    return shapes


def _mla_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    plain, rotary, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    return {
        "self_attn.q_proj.weight": (heads * (plain + rotary), hidden),
        "self_attn.kv_a_proj_with_mqa.weight": (latent + rotary, hidden),
        "self_attn.kv_a_layernorm.weight": (latent,),
        "self_attn.kv_b_proj.weight": (heads * (plain + value), latent),
        "self_attn.o_proj.weight": (hidden, heads * value),
    }


def _moe_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    family, hidden = config["model_type"], config["hidden_size"]
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    experts = config[EXPERT_COUNT[family]]
    intermediate = config.get("moe_intermediate_size", config["intermediate_size"])
    shapes: dict[str, tuple[int, ...]] = {f"{block}.gate.weight": (experts, hidden)}
    for expert in range(experts):
        shapes |= _mlp_shapes(f"{block}.experts.{expert}", hidden, intermediate, family == "mixtral")
    if family == "qwen2_moe":
        shapes |= _mlp_shapes("mlp.shared_expert", hidden, config["shared_expert_intermediate_size"])
        shapes["mlp.shared_expert_gate.weight"] = (1, hidden)
    if config.get("n_shared_experts"):
        shapes |= _mlp_shapes("mlp.shared_experts", hidden, intermediate * config["n_shared_experts"])
    return shapes


def _mlp_shapes(prefix: str, hidden: int, intermediate: int, mixtral: bool = False) -> dict[str, tuple[int, ...]]:
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    return {
        f"{prefix}.{gate}.weight": (intermediate, hidden),
        f"{prefix}.{up}.weight": (intermediate, hidden),
        f"{prefix}.{down}.weight": (hidden, intermediate),
    }


def _fuse(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    experts = config[EXPERT_COUNT[config["model_type"]]]
    fused = {name.replace(".block_sparse_moe.", ".mlp."): t for name, t in tensors.items() if ".experts." not in name}
    for layer in range(config["num_hidden_layers"]):
        block, (gate, up, down) = f"model.layers.{layer}.mlp.experts", ("gate_proj", "up_proj", "down_proj")
        if config["model_type"] == "mixtral":
            block, (gate, up, down) = f"model.layers.{layer}.block_sparse_moe.experts", ("w1", "w3", "w2")
        if f"{block}.0.{gate}.weight" not in tensors:
            continue
        stacked = {
            name: torch.stack([tensors[f"{block}.{expert}.{name}.weight"] for expert in range(experts)])
            for name in (gate, up, down)
        }
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([stacked[gate], stacked[up]], dim=1)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = stacked[down]
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
