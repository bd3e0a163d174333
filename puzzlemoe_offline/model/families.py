"""The supported model families.  A new one is a row in the table, not a code path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from puzzlemoe_vllm.errors import UserError, shown


class UnsupportedModel(UserError):
    """A model that the tool cannot compress; the text lists what it can, or what to use instead."""


@dataclass(frozen=True)
class Family:
    """What a family calls things, on disk, in config.json and in transformers' class.

    In config.json: experts: the keys that may hold the expert count, the family's own first; top_k: the key of the
    experts that a token chooses; intermediate: that of an expert's intermediate size; nested: whether the language
    model's fields are in `text_config`; values: by key, the values that transformers' and vLLM's routers assume, where
    the key is there at all.
    On disk: prefix: what names of the language model begin with; block: the MoE block inside a decoder layer; gate, up,
    down: an expert's projections; fused: gate and up, and down, of all experts in one tensor [E, N, K] each, below the
    block; writes_fused: whether that is the only form that readers of the family take.
    router: the tensors below the block that have a row (or a column) for each expert, the router's weight first, and
    what transformers calls them.  float32: ends of names whose tensors stay in float32 where they are stored so, as
    vLLM holds them.  shared: the shared experts, below the block.
    mtp_layers: the key of how many decoder layers beyond the last are for multi-token prediction; copied: other tensors
    that are copied as they are, by what their names begin with: their part's name.
    In transformers: module, norm, rotary: the block inside a decoder layer, and the last norm and the rotary embedding;
    native: the model_type of its class, where it is another.
    remote_config: vLLM has the model, but reads config.json with code of the checkpoint.
    """

    title: str
    experts: tuple[str, ...]
    top_k: str = "num_experts_per_tok"
    intermediate: str = "moe_intermediate_size"
    nested: bool = False
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    prefix: str = "model."
    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj")
    writes_fused: bool = False
    router: Mapping[str, str] = field(default_factory=lambda: {"gate.weight": "gate.weight"})
    float32: tuple[str, ...] = ()
    shared: str | None = None
    mtp_layers: str | None = None
    copied: Mapping[str, str] = field(default_factory=dict)
    module: str = "mlp"
    norm: str = "norm"
    rotary: str = "rotary_emb"
    native: str | None = None
    remote_config: bool = False

    @property
    def projections(self) -> tuple[str, str, str]:
        """Names of the gate, up and down projection."""
        return self.gate, self.up, self.down

    def text(self, config: dict[str, Any]) -> dict[str, Any]:
        """The language model's part of a config.json; itself where it is not nested."""
        if not self.nested:
            return config
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise UnsupportedModel(
                f"text_config of {self.title} is {shown(repr(text), 60)} in config.json, expected a JSON object: "
                "copy it again"
            )
        return text

    def experts_key(self, text: dict[str, Any]) -> str:
        """The key that holds the expert count in a language model's config; the family's own when none does."""
        return next((key for key in self.experts if key in text), self.experts[0])

    def check(self, text: dict[str, Any]) -> None:
        """Raises UnsupportedModel for routing or an activation that is not that of transformers' and vLLM's class."""
        for key, known in {**VALUES, **self.values}.items():
            if key in text and text[key] not in known:
                raise UnsupportedModel(
                    f"{key} {shown(repr(text[key]), 60)} in config.json is not supported: {self.title} is known with "
                    f"{' or '.join(map(repr, known))}"
                )
        for key, reason in FEATURES.items():
            if text.get(key):
                raise UnsupportedModel(f"{key} {shown(repr(text[key]), 60)} in config.json is not supported: {reason}")


VALUES: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish"), "scoring_func": ("softmax",)}
"""`Family.values` of families that do not say otherwise."""

FEATURES = {
    "swiglu_limit": "its experts clamp their activations",
    "swiglu_limits": "its experts clamp their activations",
    "mlp_bias": "its experts have biases",
    "moe_bias": "its experts have biases",
    "apply_router_weight_on_input": "the router's weights multiply the experts' inputs",
    "moe_apply_router_weight_on_input": "the router's weights multiply the experts' inputs",
    "zero_expert_num": "its router may choose an expert that computes nothing",
    "num_hash_layers": "some of its layers choose experts by token id",
}
"""Keys of config.json for what no family here has, when they are set, and what that is."""

MIXTRAL: dict[str, Any] = {"gate": "w1", "up": "w3", "down": "w2"}
BIAS = "gate.e_score_correction_bias"
SIGMOID: dict[str, Any] = {
    "router": {"gate.weight": "gate.weight", BIAS: BIAS},
    "float32": ("gate.weight", BIAS),
    "values": {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
}
"""DeepSeek-V3's router: sigmoid scores, and a bias that decides the choice alone."""
MTP = "multi-token prediction"

_DEEPSEEK = Family("DeepSeek-V2", ("n_routed_experts",), shared="shared_experts")
_DEEPSEEK_V3 = replace(
    _DEEPSEEK, title="DeepSeek-V3 / R1 / Moonlight", mtp_layers="num_nextn_predict_layers", **SIGMOID
)
_QWEN3_NEXT = Family(
    "Qwen3-Next",
    ("num_experts",),
    float32=("linear_attn.A_log",),
    shared="shared_expert",
    copied={"mtp.": MTP},
)

FAMILIES = {
    "mixtral": Family(
        "Mixtral", ("num_local_experts",), intermediate="intermediate_size", block="block_sparse_moe", **MIXTRAL
    ),
    # The second key is what transformers writes when it saves a model again.
    "qwen3_moe": Family("Qwen3-MoE", ("num_experts", "num_local_experts")),
    "qwen2_moe": Family("Qwen2-MoE / Qwen1.5-MoE", ("num_experts",), shared="shared_expert"),
    "deepseek_v2": _DEEPSEEK,
    "deepseek": replace(_DEEPSEEK, title="DeepSeek-MoE", remote_config=True),
    "olmoe": Family("OLMoE", ("num_experts",), intermediate="intermediate_size"),
    "glm4_moe": replace(_DEEPSEEK_V3, title="GLM-4.5 / 4.6 / 4.7"),
    "glm4_moe_lite": replace(_DEEPSEEK_V3, title="GLM-4.7-Flash"),
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": replace(_DEEPSEEK_V3, title="Kimi-K2", native="deepseek_v3", remote_config=True),
    "dots1": replace(_DEEPSEEK_V3, title="dots.llm1", mtp_layers=None),
    "minimax_m2": Family(
        "MiniMax-M2",
        ("num_local_experts",),
        intermediate="intermediate_size",
        values={"scoring_func": ("sigmoid",), "use_routing_bias": (True,)},
        block="block_sparse_moe",
        router={name: name for name in ("gate.weight", "e_score_correction_bias")},
        float32=("gate.weight", "e_score_correction_bias"),
        mtp_layers="num_mtp_modules",
        **MIXTRAL,
    ),
    "ernie4_5_moe": Family(
        "ERNIE-4.5",
        ("moe_num_experts",),
        top_k="moe_k",
        values={"use_bias": (False,)},
        router={
            "gate.weight": "gate.weight",
            "moe_statics.e_score_correction_bias": "gate.moe_statics.e_score_correction_bias",
        },
        float32=("gate.weight", "moe_statics.e_score_correction_bias"),
        shared="shared_experts",
        copied={"model.mtp_": MTP},
    ),
    "hunyuan_v1_moe": Family(
        "Hunyuan-A13B",
        ("num_experts",),
        top_k="moe_topk",
        intermediate="intermediate_size",
        values={"use_cla": (False,)},
        router={"gate.wg.weight": "gate.wg.weight"},
        float32=("gate.wg.weight",),
        shared="shared_mlp",
    ),
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5_moe": replace(
        _QWEN3_NEXT,
        title="Qwen3.5-MoE / Qwen3.6-MoE",
        nested=True,
        prefix="model.language_model.",
        copied={"mtp.": MTP, "model.visual.": "vision tower"},
    ),
    "granitemoe": Family(
        "Granite-MoE",
        ("num_local_experts",),
        intermediate="intermediate_size",
        block="block_sparse_moe",
        fused=("input_linear.weight", "output_linear.weight"),
        writes_fused=True,
        router={"router.layer.weight": "router.weight"},
        module="block_sparse_moe",
    ),
    "lfm2_moe": Family(
        "LFM2-MoE",
        ("num_experts",),
        values={"use_expert_bias": (True,)},
        block="feed_forward",
        router={name: name for name in ("gate.weight", "expert_bias")},
        float32=("expert_bias",),
        module="feed_forward",
        norm="embedding_norm",
        rotary="pos_emb",
        **MIXTRAL,
    ),
    # vLLM's router has these numbers in its code.
    "phimoe": Family(
        "Phi-3.5-MoE",
        ("num_local_experts",),
        intermediate="intermediate_size",
        values={"router_jitter_noise": (0.01,), "num_experts_per_tok": (2,)},
        block="block_sparse_moe",
        router={"gate.weight": "router.weight"},
        **MIXTRAL,
    ),
}
"""Rows by config.json's model_type."""

REFUSED = {
    "gpt_oss": "its experts take 4.25 bits a weight already (MXFP4), and have biases: serve it as it is",
    "llama4": "the router's weights multiply the experts' inputs: use a 4-bit checkpoint of llm-compressor",
    "gemma4": "its experts are gated by GELU: use a 4-bit checkpoint of llm-compressor",
    "nemotron_h": "its experts have no gate projection: use its FP8 or NVFP4 checkpoint",
}
"""Why a model_type is refused, and what to use instead."""


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json.  Raises UnsupportedModel, listing the families, for a family that is none of them,
    and for features that the family's models do not have."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        if isinstance(model_type, str) and (reason := REFUSED.get(model_type.removesuffix("_text"))):
            raise UnsupportedModel(f"model_type {model_type!r} is not supported: {reason}")
        raise UnsupportedModel(
            f"model_type {shown(repr(model_type), 60)} is not supported; these are: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    family.check(family.text(config))
    return family


def expert_groups(text: dict[str, Any]) -> int:
    """Number of expert groups that the router picks from (group-limited routing), 1 without groups.

    text: the language model's config.  Whatever topk_method says: vLLM heeds n_group alone.  Raises UnsupportedModel
    for what is no number of groups.
    """
    groups = text.get("n_group")
    if groups is None:
        return 1
    if type(groups) is not int or groups < 0:
        raise UnsupportedModel(f"n_group is {shown(repr(groups), 60)} in config.json, expected a number: copy it again")
    return groups or 1
