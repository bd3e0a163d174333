"""Names and shapes of the tensors of the tiny checkpoints, as each family's hub checkpoints have them.

Written by hand from the hub's checkpoints, and by nothing that the offline tool knows.
"""

from __future__ import annotations

from typing import Any

from support.model_configs import EXPERT_COUNT, text_config

Shapes = dict[str, tuple[int, ...]]

BLOCK = {
    "mixtral": "block_sparse_moe",
    "minimax_m2": "block_sparse_moe",
    "phimoe": "block_sparse_moe",
    "granitemoe": "block_sparse_moe",
    "lfm2_moe": "feed_forward",
}
"""A decoder layer's MoE block, where it is not `mlp`."""

W123 = ("mixtral", "minimax_m2", "phimoe", "lfm2_moe")
"""Families whose projections are w1, w3 and w2."""

FLOAT32_ROUTERS = ("minimax_m2", "ernie4_5_moe", "hunyuan_v1_moe")
"""Families whose routers' weights the hub has in float32."""


def prefix(family: str) -> str:
    """What names of the language model begin with."""
    return "model.language_model." if family == "qwen3_5_moe" else "model."


def block(family: str) -> str:
    """A decoder layer's MoE block."""
    return BLOCK.get(family, "mlp")


def projections(family: str) -> tuple[str, str, str]:
    """Names of the gate, up and down projection."""
    return ("w1", "w3", "w2") if family in W123 else ("gate_proj", "up_proj", "down_proj")


def model_shapes(config: dict[str, Any]) -> Shapes:
    """Every tensor of a checkpoint, experts one by one."""
    family, text = config["model_type"], text_config(config)
    start, hidden, vocabulary = prefix(family), text["hidden_size"], text["vocab_size"]
    shapes = {
        f"{start}layers.{layer}.{name}": shape
        for layer in range(text["num_hidden_layers"])
        for name, shape in layer_shapes(family, text, layer).items()
    }
    norm = "embedding_norm" if family == "lfm2_moe" else "norm"
    shapes |= {f"{start}embed_tokens.weight": (vocabulary, hidden), f"{start}{norm}.weight": (hidden,)}
    if family == "phimoe":
        shapes |= {"model.norm.bias": (hidden,), "lm_head.bias": (vocabulary,)}
    if not text.get("tie_word_embeddings", text.get("tie_embedding")):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes | _mtp_shapes(family, text) | _vision_shapes(config)


def layer_shapes(family: str, text: dict[str, Any], layer: int) -> Shapes:
    """Those of a decoder layer, by names below it."""
    hidden = text["hidden_size"]
    dense = max(text.get("first_k_dense_replace", 0), text.get("moe_layer_start_index", 0))
    if layer < max(dense, text.get("num_dense_layers", 0)) or layer in text.get("mlp_only_layers", ()):
        ffn = _mlp_shapes(block(family), hidden, text["intermediate_size"], projections(family))
    else:
        ffn = moe_shapes(family, text)
    norms = ("operator_norm", "ffn_norm") if family == "lfm2_moe" else ("input_layernorm", "post_attention_layernorm")
    shapes = _mixer_shapes(family, text, layer) | {f"{norm}.weight": (hidden,) for norm in norms} | ffn
    if family == "phimoe":
        shapes |= {f"{norm}.bias": (hidden,) for norm in norms}
    return shapes


def _mixer_shapes(family: str, text: dict[str, Any], layer: int) -> Shapes:
    if "kv_lora_rank" in text:
        return _mla_shapes(text)
    if family in ("qwen3_next", "qwen3_5_moe") and (layer + 1) % text["full_attention_interval"]:
        return _delta_net_shapes(family, text)
    if family == "lfm2_moe" and text["layer_types"][layer] == "conv":
        hidden = text["hidden_size"]
        return {
            "conv.in_proj.weight": (3 * hidden, hidden),
            "conv.out_proj.weight": (hidden, hidden),
            "conv.conv.weight": (hidden, 1, text["conv_L_cache"]),
        }
    return _attention_shapes(family, text)


def _attention_shapes(family: str, text: dict[str, Any]) -> Shapes:
    hidden = text["hidden_size"]
    head = text.get("head_dim") or hidden // text["num_attention_heads"]
    query, key = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    gated = family in ("qwen3_next", "qwen3_5_moe")
    out = "out_proj" if family == "lfm2_moe" else "o_proj"
    sizes = {"q_proj": query * (2 if gated else 1), "k_proj": key, "v_proj": key}
    shapes: Shapes = {f"self_attn.{name}.weight": (size, hidden) for name, size in sizes.items()}
    shapes[f"self_attn.{out}.weight"] = (hidden, query)
    if family in ("qwen2_moe", "glm4_moe", "phimoe"):
        shapes |= {f"self_attn.{name}.bias": (size,) for name, size in sizes.items()}
    if family == "phimoe":
        shapes["self_attn.o_proj.bias"] = (hidden,)
    normed = text.get("use_qk_norm", True)  # GLM-4.5 has these norms, GLM-4.5-Air has not
    if normed and family in ("qwen3_moe", "glm4_moe", "dots1", "qwen3_next", "qwen3_5_moe"):
        shapes |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    if family in ("olmoe", "minimax_m2"):
        shapes |= {"self_attn.q_norm.weight": (query,), "self_attn.k_norm.weight": (key,)}
    if family == "hunyuan_v1_moe":
        shapes |= {"self_attn.query_layernorm.weight": (head,), "self_attn.key_layernorm.weight": (head,)}
    if family == "lfm2_moe":
        shapes |= {"self_attn.q_layernorm.weight": (head,), "self_attn.k_layernorm.weight": (head,)}
    return shapes


def _mla_shapes(text: dict[str, Any]) -> Shapes:
    hidden, heads, latent = text["hidden_size"], text["num_attention_heads"], text["kv_lora_rank"]
    plain, rotary, value = text["qk_nope_head_dim"], text["qk_rope_head_dim"], text["v_head_dim"]
    query = heads * (plain + rotary)
    shapes: Shapes = {
        "self_attn.kv_a_proj_with_mqa.weight": (latent + rotary, hidden),
        "self_attn.kv_a_layernorm.weight": (latent,),
        "self_attn.kv_b_proj.weight": (heads * (plain + value), latent),
        "self_attn.o_proj.weight": (hidden, heads * value),
    }
    if rank := text["q_lora_rank"]:
        return shapes | {
            "self_attn.q_a_proj.weight": (rank, hidden),
            "self_attn.q_a_layernorm.weight": (rank,),
            "self_attn.q_b_proj.weight": (query, rank),
        }
    return shapes | {"self_attn.q_proj.weight": (query, hidden)}


def _delta_net_shapes(family: str, text: dict[str, Any]) -> Shapes:
    hidden, values = text["hidden_size"], text["linear_num_value_heads"]
    key = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    value = values * text["linear_value_head_dim"]
    sizes = {"in_proj_qkvz": 2 * key + 2 * value, "in_proj_ba": 2 * values}
    if family == "qwen3_5_moe":
        sizes = {"in_proj_qkv": 2 * key + value, "in_proj_z": value, "in_proj_b": values, "in_proj_a": values}
    shapes: Shapes = {f"linear_attn.{name}.weight": (size, hidden) for name, size in sizes.items()}
    return shapes | {
        "linear_attn.conv1d.weight": (2 * key + value, 1, text["linear_conv_kernel_dim"]),
        "linear_attn.dt_bias": (values,),
        "linear_attn.A_log": (values,),
        "linear_attn.norm.weight": (text["linear_value_head_dim"],),
        "linear_attn.out_proj.weight": (hidden, value),
    }


def moe_shapes(family: str, text: dict[str, Any]) -> Shapes:
    """Those of a MoE block, by names below the decoder layer."""
    hidden, name = text["hidden_size"], block(family)
    experts = text[EXPERT_COUNT[family]]
    intermediate = text.get("moe_intermediate_size", text.get("intermediate_size"))
    intermediate = intermediate[0] if isinstance(intermediate, list) else intermediate
    router = {"hunyuan_v1_moe": "gate.wg", "granitemoe": "router.layer"}.get(family, "gate")
    shapes: Shapes = {f"{name}.{router}.weight": (experts, hidden)}
    if family in ("glm4_moe", "glm4_moe_lite", "deepseek_v3", "kimi_k2", "dots1"):
        shapes["mlp.gate.e_score_correction_bias"] = (experts,)
    if family == "minimax_m2":
        shapes["block_sparse_moe.e_score_correction_bias"] = (experts,)
    if family == "ernie4_5_moe":
        shapes["mlp.moe_statics.e_score_correction_bias"] = (1, experts)
    if family == "lfm2_moe":
        shapes["feed_forward.expert_bias"] = (experts,)
    for expert in range(experts):
        shapes |= _mlp_shapes(f"{name}.experts.{expert}", hidden, intermediate, projections(family))
    if "shared_expert_intermediate_size" in text:
        shapes |= _mlp_shapes("mlp.shared_expert", hidden, text["shared_expert_intermediate_size"])
        shapes["mlp.shared_expert_gate.weight"] = (1, hidden)
    if shared := text.get("n_shared_experts", text.get("moe_num_shared_experts")):
        shapes |= _mlp_shapes("mlp.shared_experts", hidden, intermediate * shared)
    if family == "hunyuan_v1_moe":
        shapes |= _mlp_shapes("mlp.shared_mlp", hidden, intermediate)
    return shapes


def _mlp_shapes(
    name: str, hidden: int, intermediate: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Shapes:
    gate, up, down = names
    return {
        f"{name}.{gate}.weight": (intermediate, hidden),
        f"{name}.{up}.weight": (intermediate, hidden),
        f"{name}.{down}.weight": (hidden, intermediate),
    }


def _mtp_shapes(family: str, text: dict[str, Any]) -> Shapes:
    """One layer for multi-token prediction, where the hub's checkpoints have one."""
    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    if text.get("num_nextn_predict_layers") and family != "ernie4_5_moe":
        shapes = layer_shapes(family, text, layers) | {
            "eh_proj.weight": (hidden, 2 * hidden),
            "enorm.weight": (hidden,),
            "hnorm.weight": (hidden,),
            "embed_tokens.weight": (text["vocab_size"], hidden),
            "shared_head.norm.weight": (hidden,),
            "shared_head.head.weight": (text["vocab_size"], hidden),
        }
        return {f"model.layers.{layers}.{name}": shape for name, shape in shapes.items()}
    if family in ("qwen3_next", "qwen3_5_moe"):
        full = text["full_attention_interval"] - 1
        shapes = {f"layers.0.{name}": shape for name, shape in layer_shapes(family, text, full).items()} | {
            "fc.weight": (hidden, 2 * hidden),
            "norm.weight": (hidden,),
            "pre_fc_norm_embedding.weight": (hidden,),
            "pre_fc_norm_hidden.weight": (hidden,),
        }
        return {f"mtp.{name}": shape for name, shape in shapes.items()}
    if family == "ernie4_5_moe":
        shapes = {f"mtp_block.0.{name}": shape for name, shape in layer_shapes(family, text, 0).items()} | {
            "mtp_emb_norm.0.weight": (hidden,),
            "mtp_hidden_norm.0.weight": (hidden,),
            "mtp_linear_proj.0.weight": (hidden, 2 * hidden),
        }
        return {f"model.{name}": shape for name, shape in shapes.items()}
    return {}


def _vision_shapes(config: dict[str, Any]) -> Shapes:
    if "vision_config" not in config:
        return {}
    vision = config["vision_config"]
    hidden, intermediate = vision["hidden_size"], vision["intermediate_size"]
    merged = hidden * vision["spatial_merge_size"] ** 2
    patch = (vision["in_channels"], vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
    layers = {
        "blocks.0.attn.qkv": (3 * hidden, hidden),
        "blocks.0.attn.proj": (hidden, hidden),
        "blocks.0.mlp.linear_fc1": (intermediate, hidden),
        "blocks.0.mlp.linear_fc2": (hidden, intermediate),
        "merger.linear_fc1": (merged, merged),
        "merger.linear_fc2": (vision["out_hidden_size"], merged),
        "patch_embed.proj": (hidden, *patch),
    }
    shapes: Shapes = {"pos_embed.weight": (vision["num_position_embeddings"], hidden)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in ("blocks.0.norm1", "blocks.0.norm2", "merger.norm"):
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    return {f"model.visual.{name}": shape for name, shape in shapes.items()}
