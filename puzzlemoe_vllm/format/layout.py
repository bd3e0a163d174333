"""The checkpoint layout: tensor names, and the `quantization_config` of a packed model's config.json."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from puzzlemoe_vllm.errors import UserError, shown
from puzzlemoe_vllm.format.codes import CODES, get_code

QUANT_METHOD = "puzzlemoe"
FORMAT_VERSION = 2
"""Version 1 had no digests of the shards."""

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Keys of a model's config.json that hold its number of routed experts."""

WORDS = "puzzle"
"""Suffix of a pair's words: `...experts.{leader}.{projection}.puzzle`.  It must not end in `.weight`, or vLLM's expert
parallel filter would drop a pair whose leader lives on another rank."""

STEPS = "puzzle_grid"
"""Suffix of a pair's steps, bf16 [N, K / group_size], beside its words; only for codes that have steps."""


TRANSFORMERS_WEIGHTS = (
    "none that transformers reads by itself: install puzzlemoe-vllm and `import puzzlemoe_vllm.transformers` first, "
    "or serve the model with vLLM"
)
"""`transformers_weights` of a packed model's config.json, where transformers looks for the name of a file.  Without
`puzzlemoe_vllm.transformers` it would warn of an unknown quantization and fill the experts at random; it stops at this
name instead, with an error that ends in it.  vLLM does not read the field."""


class LayoutError(UserError):
    """A packed checkpoint that this version cannot read; the text says what to do about it."""


class Provenance(BaseModel):
    """Where a packed model came from; nothing at run time depends on it."""

    model_config = ConfigDict(extra="allow")

    source: str
    revision: str | None = None
    tool_version: str
    recipe: dict[str, Any]
    calibration: dict[str, Any] | None = None


class PuzzleConfig(BaseModel):
    """`quantization_config` of config.json.

    merged_experts: decoder layer index -> number of its experts stored in pairs; they are experts 0..n-1 of the layer,
    experts 2p and 2p+1 sharing one word.  A layer that is not listed has no pairs.
    clusters: decoder layer index -> for each of its experts the one that serves in its place, itself or another; only
    these have tensors, dense ones.  The router keeps choosing among all experts.
    code: of the pair words; None when nothing is merged in pairs.
    group_size: input columns that share a step; None for codes without steps.
    fp8: linear layers outside routed experts that are stored in FP8, by the names of their weights on disk without
    `.weight`; beside each lie its scales, see `format.fp8`.
    """

    model_config = ConfigDict(extra="ignore")

    quant_method: Literal["puzzlemoe"] = "puzzlemoe"
    format_version: int = FORMAT_VERSION
    code: str | None = None
    group_size: int | None = None
    merged_experts: dict[int, int] = Field(default_factory=dict)
    clusters: dict[int, list[int]] = Field(default_factory=dict)
    fp8: list[str] = Field(default_factory=list)
    provenance: Provenance | None = None

    @field_validator("format_version")
    @classmethod
    def _known_version(cls, version: int) -> int:
        if version != FORMAT_VERSION:
            raise ValueError(
                f"format_version is {version}, this puzzlemoe-vllm reads {FORMAT_VERSION}: "
                + ("upgrade puzzlemoe-vllm" if version > FORMAT_VERSION else "compress the source model again")
            )
        return version

    @field_validator("code")
    @classmethod
    def _known_code(cls, code: str | None) -> str | None:
        if code is not None and code not in CODES:
            raise ValueError(f"code {code!r} is not known to this version (known: {', '.join(CODES)})")
        return code

    @field_validator("merged_experts")
    @classmethod
    def _even(cls, merged: dict[int, int]) -> dict[int, int]:
        for layer, count in merged.items():
            if count < 2 or count % 2:
                raise ValueError(f"merged_experts of layer {layer} is {count}; experts merge in pairs")
        return merged

    @field_validator("clusters")
    @classmethod
    def _centres_serve_themselves(cls, clusters: dict[int, list[int]]) -> dict[int, list[int]]:
        for layer, centres in clusters.items():
            for expert, centre in enumerate(centres):
                if not 0 <= centre < len(centres) or centres[centre] != centre:
                    raise ValueError(
                        f"expert {expert} of layer {layer} is served by expert {centre}, which does not serve itself"
                    )
        return clusters

    @model_validator(mode="after")
    def _pairs_or_clusters(self) -> PuzzleConfig:
        if both := sorted(self.clusters.keys() & self.merged_experts.keys()):
            raise ValueError(f"layer {both[0]} is in both merged_experts and clusters")
        if not self.merged_experts and not self.clusters:
            raise ValueError(
                "both merged_experts and clusters are empty, so no expert would be loaded: config.json was edited; "
                "copy or download it again"
            )
        if (self.code is None) == bool(self.merged_experts):
            raise ValueError(
                "code is missing: copy or download config.json again"
                if self.merged_experts
                else f"code is {self.code!r}, but no layer is in merged_experts: copy or download config.json again"
            )
        return self

    @model_validator(mode="after")
    def _group_size_fits(self) -> PuzzleConfig:
        if self.code is not None:
            get_code(self.code).check_group_size(self.group_size)
        elif self.group_size is not None:
            raise ValueError(f"group_size is {self.group_size}, but there is no code")
        return self


def parse_config(raw: dict[str, Any], where: str = "quantization_config") -> PuzzleConfig:
    """Validated `quantization_config`.  Raises LayoutError: one line that names `where`, the field and the way out."""
    try:
        return PuzzleConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "quantization_config"
        message = first["msg"].removeprefix("Value error, ")
        raise LayoutError(f"{where}: {shown(field, 80)}: {shown(message, 200)}") from None


def layout_digest(config: PuzzleConfig) -> str:
    """SHA-256 of what decides how tensors are read: code, group size, pairs and clusters, and FP8 layers if there are.

    The index keeps it: two clusterings with the same centres have the same tensors.
    """
    read = {"code", "group_size", "merged_experts", "clusters"}
    fields = config.model_dump(mode="json", include=read | ({"fp8"} if config.fp8 else set()))
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def decoder_layer(name: str) -> int | None:
    """The decoder layer of a tensor or module, e.g. 3 of `model.language_model.layers.3.mlp.experts`; None elsewhere.

    Anchored: layers for multi-token prediction (`mtp.layers.0`) and of a vision tower have numbers of their own.
    """
    match = re.match(r"(?:(?:model|language_model)\.)*layers\.(\d{1,9})\.", name)
    return int(match[1]) if match else None


def words_name(experts: str, leader: int, projection: str) -> str:
    """Name of the words of the pair (leader, leader + 1), e.g. `model.layers.0.mlp.experts.4.up_proj.puzzle`."""
    return f"{experts}.{leader}.{projection}.{WORDS}"


def steps_name(experts: str, leader: int, projection: str) -> str:
    """Name of the steps of the pair (leader, leader + 1), e.g. `model.layers.0.mlp.experts.4.up_proj.puzzle_grid`."""
    return f"{experts}.{leader}.{projection}.{STEPS}"


def weight_name(experts: str, expert: int, projection: str) -> str:
    """Name of a dense expert's weight, as in the source model."""
    return f"{experts}.{expert}.{projection}.weight"
