"""config.json of the tiny random checkpoints, with the keys that each family's hub checkpoints have."""

from __future__ import annotations

from typing import Any

END_ID = 256
VOCABULARY = 257

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

_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}

_SIGMOID: dict[str, Any] = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 1,
    "topk_group": 1,
    "attention_bias": False,
}

_QWEN_HYBRID: dict[str, Any] = {
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "head_dim": 32,
    "partial_rotary_factor": 0.25,
    "attention_bias": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "norm_topk_prob": True,
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
    "glm4_moe": _COMMON
    | _SIGMOID
    | {
        "architectures": ["Glm4MoeForCausalLM"],
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "use_qk_norm": True,
        "num_nextn_predict_layers": 1,
    },
    "glm4_moe_lite": _COMMON
    | _SIGMOID
    | _MLA
    | {"architectures": ["Glm4MoeLiteForCausalLM"], "q_lora_rank": 64, "num_nextn_predict_layers": 1},
    "deepseek_v3": _COMMON
    | _SIGMOID
    | _MLA
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "q_lora_rank": 64,
        "num_nextn_predict_layers": 1,
        "moe_layer_freq": 1,
        "n_group": 4,
        "topk_group": 2,
    },
    "kimi_k2": _COMMON
    | _SIGMOID
    | _MLA
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "q_lora_rank": None,
        "num_nextn_predict_layers": 0,
        "moe_layer_freq": 1,
        "n_routed_experts": 12,
    },
    "dots1": _COMMON
    | _SIGMOID
    | {
        "architectures": ["Dots1ForCausalLM"],
        "head_dim": 32,
        "n_shared_experts": 2,
        "moe_layer_freq": 1,
        "sliding_window": None,
        "max_window_layers": 3,
    },
    "minimax_m2": _COMMON
    | {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "head_dim": 32,
        "rotary_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 64,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "attn_type_list": [1, 1],
        "num_mtp_modules": 1,
        "use_mtp": True,
        "shared_intermediate_size": 0,
    },
    "ernie4_5_moe": _COMMON
    | {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "num_hidden_layers": 3,
        "intermediate_size": 192,
        "moe_intermediate_size": 64,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": True,
        "use_bias": False,
    },
    "hunyuan_v1_moe": _COMMON
    | {
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "head_dim": 32,
        "attention_head_dim": 32,
        "attention_bias": False,
        "num_experts": 8,
        "moe_topk": [3, 3],
        "num_shared_expert": [1, 1],
        "intermediate_size": 64,
        "moe_intermediate_size": [64, 64],
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": False,
    },
    "qwen3_next": _COMMON | _QWEN_HYBRID | {"architectures": ["Qwen3NextForCausalLM"], "intermediate_size": 192},
    "qwen3_5_moe": {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "image_token_id": 250,
        "video_token_id": 251,
        "vision_start_token_id": 252,
        "vision_end_token_id": 253,
        "tie_word_embeddings": False,
        "text_config": _COMMON
        | _QWEN_HYBRID
        | {
            "model_type": "qwen3_5_moe_text",
            "mtp_num_hidden_layers": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
                "mrope_interleaved": True,
                "mrope_section": [2, 1, 1],
            },
        },
        "vision_config": {
            "model_type": "qwen3_5_moe",
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "in_channels": 3,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 128,
            "num_position_embeddings": 16,
        },
    },
    "granitemoe": _COMMON
    | {
        "architectures": ["GraniteMoeForCausalLM"],
        "num_local_experts": 8,
        "intermediate_size": 64,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 1.5,
        "logits_scaling": 1.25,
        "residual_multiplier": 0.8,
        "tie_word_embeddings": True,
    },
    "lfm2_moe": {key: value for key, value in _COMMON.items() if key not in ("rms_norm_eps", "tie_word_embeddings")}
    | {
        "architectures": ["Lfm2MoeForCausalLM"],
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 192,
        "moe_intermediate_size": 64,
        "conv_L_cache": 3,
        "conv_bias": False,
        "norm_eps": 1e-5,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "tie_embedding": True,
        "use_expert_bias": True,
    },
    "phimoe": _COMMON
    | {
        "architectures": ["PhiMoEForCausalLM"],
        "num_local_experts": 8,
        "intermediate_size": 64,
        "attention_bias": True,
        "lm_head_bias": True,
        "router_jitter_noise": 0.01,
        "input_jitter_noise": 0.01,
        "sliding_window": None,
    },
}
"""config.json by family, without model_type; the keys that the family's hub checkpoints have."""


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json."""
    text: dict[str, Any] = config.get("text_config", config)
    return text


EXPERT_COUNT = {
    "mixtral": "num_local_experts",
    "qwen3_moe": "num_experts",
    "qwen2_moe": "num_experts",
    "deepseek_v2": "n_routed_experts",
    "deepseek": "n_routed_experts",
    "olmoe": "num_experts",
    "glm4_moe": "n_routed_experts",
    "glm4_moe_lite": "n_routed_experts",
    "deepseek_v3": "n_routed_experts",
    "kimi_k2": "n_routed_experts",
    "dots1": "n_routed_experts",
    "minimax_m2": "num_local_experts",
    "ernie4_5_moe": "moe_num_experts",
    "hunyuan_v1_moe": "num_experts",
    "qwen3_next": "num_experts",
    "qwen3_5_moe": "num_experts",
    "granitemoe": "num_local_experts",
    "lfm2_moe": "num_experts",
    "phimoe": "num_local_experts",
}
"""The config.json key of a family's number of routed experts."""
