"""Packed folders through `from_pretrained`: `import puzzlemoe_vllm.transformers`, then load as any other model.

Importing this registers the quantization method with transformers.  Pair words become dense bf16 experts while they are
read, by an operation that stands before the ones that transformers has for the family's dense experts: the model takes
as much memory as the unpacked one, and is an ordinary model in every respect.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from puzzlemoe_vllm.format.codes import get_code
from puzzlemoe_vllm.format.fp8 import FP8_BLOCK, FP8_SCALE, dequantize, scale_shape, scales_name
from puzzlemoe_vllm.format.layout import (
    QUANT_METHOD,
    STEPS,
    WORDS,
    LayoutError,
    PuzzleConfig,
    decoder_layer,
    parse_config,
)

logger = logging.get_logger("transformers.puzzlemoe")

KINDS = ("weight", WORDS, STEPS)
"""What an expert's projection is stored as: the last part of a tensor's name."""

DTYPES = {
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float32: "F32",
}
FLOATS = {"BF16", "F16", "F32"}
"""Dtypes as safetensors spells them."""


@register_quantization_config(QUANT_METHOD)
class PuzzleMoEConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed model's config.json."""

    def __init__(self, **fields: Any):
        """Raises LayoutError for a version, code or field that this package does not know."""
        self.layout = parse_config(fields)
        self.quant_method = QUANT_METHOD
        # So that transformers treats the loaded model as the dense one that it is: saves, casts and trains it.
        self.dequantize = True

    def to_dict(self) -> dict[str, Any]:
        """The fields of config.json."""
        return self.layout.model_dump()


@dataclass(frozen=True)
class StoredExperts:
    """What the file has of the experts of one layer: the first `merged` in pairs; `centres` as in PuzzleConfig."""

    merged: int
    centres: list[int]

    @classmethod
    def of(cls, layout: PuzzleConfig, parameter: str, experts: int) -> StoredExperts:
        """Those of a model's parameter.  Raises LayoutError when the layout is for another number of experts."""
        layer = layer_of(parameter)
        merged, centres = layout.merged_experts.get(layer, 0), layout.clusters.get(layer, list(range(experts)))
        if merged > experts or len(centres) != experts:
            raise LayoutError(
                f"quantization_config has {max(merged, len(centres))} experts in layer {layer}, but the model has "
                f"{experts}: config.json was edited or belongs to another model"
            )
        return cls(merged, centres)

    @property
    def leaders(self) -> list[int]:
        """Experts that have words, and steps where the code has steps."""
        return list(range(0, self.merged, 2))

    @property
    def dense(self) -> list[int]:
        """Experts that have a weight."""
        return sorted(set(self.centres[self.merged :]))


def layer_of(parameter: str) -> int:
    """The decoder layer of `model.layers.3.mlp.experts.down_proj`."""
    layer = decoder_layer(parameter)
    assert layer is not None, parameter
    return layer


def is_copied(model: Any, stored: str) -> bool:
    """Whether a stored tensor is of a part that the class does not have: layers for multi-token prediction, a tower."""
    layer, layers = decoder_layer(stored), model.config.get_text_config().num_hidden_layers
    unread = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    return (layer is not None and layer >= layers) or any(re.search(pattern, stored) for pattern in unread)


def stored_patterns(weight: str) -> list[str]:
    """transformers' pattern `.experts.*.w1.weight` for each of `KINDS`, ending where the name does."""
    return [f"{weight.removesuffix('.weight')}.{kind}$" for kind in KINDS]


def is_of_experts(conversion: WeightConverter | WeightRenaming) -> bool:
    """Whether it makes one parameter of the weights of a layer's experts."""
    return isinstance(conversion, WeightConverter) and all(
        ".experts.*." in name and name.endswith(".weight") for name in conversion.source_patterns
    )


class DecodeExperts(ConversionOps):
    """The stored tensors of a layer's experts to one dense [E, N, K] for each projection."""

    def __init__(self, layout: PuzzleConfig, weights: list[str]):
        """weights: transformers' patterns of the projections' weights."""
        self.layout, self.weights = layout, weights

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, list[Tensor]], full_layer_name: str, model: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """input_dict: by pattern, tensors in the order of their experts.  Returns bf16 [E, N, K] by pattern."""
        experts, rows, columns = model.get_parameter(full_layer_name).shape
        stored = StoredExperts.of(self.layout, full_layer_name, experts)
        shape = (experts, rows // len(self.weights), columns)
        patterns = [stored_patterns(weight) for weight in self.weights]
        return {
            kinds[0]: self._dense(stored, shape, *(input_dict.pop(kind, []) for kind in kinds)) for kinds in patterns
        }

    def _dense(
        self,
        stored: StoredExperts,
        shape: tuple[int, int, int],
        weights: list[Tensor],
        words: list[Tensor],
        steps: Sequence[Tensor | None],
    ) -> Tensor:
        experts = torch.empty(shape, dtype=torch.bfloat16, device=(weights or words)[0].device)
        for leader, pair, step in zip(stored.leaders, words, steps or [None] * len(words), strict=True):
            assert self.layout.code
            for position in (0, 1):
                experts[leader + position] = get_code(self.layout.code).decode(pair, position, step)
        by_id = dict(zip(stored.dense, weights, strict=True))
        for expert in range(stored.merged, len(experts)):
            experts[expert] = by_id[stored.centres[expert]]
        return experts


class CastToParameter(ConversionOps):
    """A tensor in the dtype of the parameter that it becomes."""

    def convert(
        self, input_dict: dict[str, list[Tensor]], full_layer_name: str, model: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """input_dict: one tensor."""
        ((tensor,),) = input_dict.values()
        return {full_layer_name: tensor.to(model.get_parameter_or_buffer(full_layer_name).dtype)}


class DequantizeLinear(ConversionOps):
    """An FP8 weight and its scales to the bf16 that they stand for."""

    def convert(
        self, input_dict: dict[str, list[Tensor]], full_layer_name: str, model: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """input_dict: by pattern, one tensor each; that of the scales is named after them."""
        stored = {FP8_SCALE in pattern: tensors[0] for pattern, tensors in input_dict.items()}
        return {full_layer_name: dequantize(stored[False], stored[True], (FP8_BLOCK, FP8_BLOCK))}


@register_quantizer(QUANT_METHOD)
class PuzzleMoEQuantizer(HfQuantizer):
    """Loads packed models as dense ones.  `from_pretrained` makes one and calls these methods in this order."""

    quantization_config: PuzzleMoEConfig
    requires_calibration = True

    def update_tp_plan(self, config: Any) -> Any:
        """Called before transformers looks for files, up to release 5.20."""
        return without_file_name(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before transformers looks for files, from release 5.18 on."""
        return without_file_name(config)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """bf16.  Raises LayoutError for another: the range of words does not fit fp16."""
        if dtype != torch.bfloat16:
            raise LayoutError(
                f"experts of a packed model decode to bfloat16, not {dtype}: load with dtype=torch.bfloat16, and "
                "convert the loaded model if need be (model.float())"
            )
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Raises LayoutError unless the files have all of the model's tensors in their shapes, and no others."""
        self.recast, self.fp8 = check_files(model, checkpoint_files or [], self.quantization_config.layout)
        experts = sum(parameter.nbytes for name, parameter in model.named_parameters() if ".experts." in name)
        logger.warning(
            f"{model.config.name_or_path}: experts are decoded to dense bfloat16, {experts / 2**30:.1f} GiB; "
            "vLLM with the puzzlemoe plugin keeps them packed."
        )

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """transformers' conversions of the family, with stored experts decoded first."""
        recast = [WeightConverter(f"^{re.escape(name)}$", name, [CastToParameter()]) for name in self.recast]
        fp8 = [
            WeightConverter([f"^{re.escape(n)}$" for n in (name, scales_name(name))], name, [DequantizeLinear()])
            for name in self.fp8
        ]
        return [self._decoding(entry) if is_of_experts(entry) else entry for entry in weight_conversions] + recast + fp8

    def _decoding(self, conversion: WeightConverter) -> WeightConverter:
        weights = list(conversion.source_patterns)
        return WeightConverter(
            # Concatenation follows the order of these, so kinds are together, not projections.
            [name for kind in zip(*map(stored_patterns, weights), strict=True) for name in kind],
            list(conversion.target_patterns),
            [DecodeExperts(self.quantization_config.layout, weights), *conversion.operations],
        )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        # Saving would undo these conversions; without them it undoes the family's own.  (Late releases do the same.)
        vars(model).pop("_weight_conversions", None)

    def is_serializable(self) -> bool:
        """The loaded model saves as a dense one."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The loaded model is a dense one."""
        return True


def without_file_name(config: Any) -> Any:
    """The model's config as unpacked folders have it, so that files are looked for under their usual names.

    Raises LayoutError where transformers would cut words for several processes as if they were weights.
    """
    if getattr(config, "distributed_config", None) is not None:
        raise LayoutError(
            "transformers cannot load a packed model in parallel: serve it with vLLM, or `puzzlemoe unpack` it"
        )
    config.transformers_weights = None
    return config


def check_files(model: Any, files: list[str], layout: PuzzleConfig) -> tuple[list[str], list[str]]:
    """Compares the files' headers with the model, whose missing parameters transformers would fill at random.

    Returns the parameters that need a cast, since under a quantizer transformers does not convert tensors that it
    renames, and those that are stored in FP8.
    Raises LayoutError for the first tensor that is missing, foreign, stored twice, or of another shape or dtype.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    fp8 = [rename_source_key(f"{layer}.weight", renamings, [])[0] for layer in layout.fp8]
    try:
        expected = expected_tensors(model, list(filter(is_of_experts, conversions)), layout)
        expected |= expected_fp8(expected, fp8)
    except LayoutError as error:
        raise LayoutError(f"{model.config.name_or_path}: {error}") from None
    found: dict[str, str] = {}
    recast = []
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118  (an open file is no mapping)
                name = rename_source_key(stored, renamings, [])[0]
                if name not in expected:
                    if is_copied(model, stored):
                        continue
                    raise LayoutError(f"{file}: {stored} belongs to no parameter of {type(model).__name__}")
                if name in found:
                    raise LayoutError(f"{file}: {stored} is in {found[name]}, too")
                found[name] = file
                header = tensors.get_slice(stored)
                expected[name].check(f"{file}: {stored}", header.get_shape(), header.get_dtype())
                if name != stored and expected[name].dtype is None:
                    recast.append(name)
    if missing := sorted(expected.keys() - found.keys() - model.all_tied_weights_keys.keys()):
        raise LayoutError(f"{model.config.name_or_path} lacks {missing[0]}; tensors missing: {len(missing)}")
    return recast, fp8


@dataclass(frozen=True)
class Expected:
    """What a header should say.  dtype: None for any float of 16 bits or more."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    def check(self, where: str, shape: list[int], dtype: str) -> None:
        """Raises LayoutError that starts with `where`.  dtype: as safetensors spells it."""
        dtypes = FLOATS if self.dtype is None else {DTYPES[self.dtype]}
        if tuple(shape) != self.shape or dtype not in dtypes:
            raise LayoutError(
                f"{where} is {dtype} {list(shape)}, the model has {' or '.join(sorted(dtypes))} {list(self.shape)}: "
                "config.json was edited or belongs to another model"
            )


def expected_tensors(model: Any, conversions: list[WeightConverter], layout: PuzzleConfig) -> dict[str, Expected]:
    """The tensors of a packed model, by name after transformers' renamings.  conversions: those of experts.

    Raises LayoutError when the layout is for another model, or for one whose experts transformers does not fuse.
    """
    expected: dict[str, Expected] = {}
    layers = set()
    for name, parameter in model.state_dict().items():
        conversion = next((entry for entry in conversions if name.endswith(entry.target_patterns[0])), None)
        if conversion is None:
            expected[name] = Expected(tuple(parameter.shape))
        else:
            expected |= expected_experts(name, tuple(parameter.shape), conversion, layout)
            layers.add(layer_of(name))
    if strange := sorted((layout.merged_experts.keys() | layout.clusters.keys()) - layers):
        raise LayoutError(
            f"quantization_config lists the experts of layer {strange[0]}, where {type(model).__name__} has none that "
            "transformers loads as one tensor: `puzzlemoe unpack` the model, unless its config.json was edited"
        )
    return expected


def expected_fp8(expected: dict[str, Expected], names: list[str]) -> dict[str, Expected]:
    """The tensors of linear layers in FP8, given a model's tensors and the names of these layers' weights.

    Raises LayoutError for one that is no weight of the model's.
    """
    found: dict[str, Expected] = {}
    for name in names:
        if name not in expected or len(shape := expected[name].shape) != 2:
            raise LayoutError(
                f"quantization_config has {name} in fp8, which is no linear layer of the model: config.json was edited "
                "or belongs to another model"
            )
        found[name] = Expected(shape, torch.float8_e4m3fn)
        found[scales_name(name)] = Expected(scale_shape(shape, (FP8_BLOCK, FP8_BLOCK)), torch.float32)
    return found


def expected_experts(
    name: str, shape: tuple[int, int, int], conversion: WeightConverter, layout: PuzzleConfig
) -> dict[str, Expected]:
    """The tensors of which a conversion makes the parameter `name` of that shape, [E, N of all projections, K]."""
    experts, rows, columns = shape
    rows //= len(conversion.source_patterns)
    stored = StoredExperts.of(layout, name, experts)
    kinds = {"weight": (stored.dense, Expected((rows, columns)))}
    if layout.code is not None:
        code = get_code(layout.code)
        kinds[WORDS] = stored.leaders, Expected(code.words_shape(rows, columns), code.dtype)
    if layout.group_size is not None:
        kinds[STEPS] = (stored.leaders, Expected((rows, columns // layout.group_size), torch.bfloat16))
    start = name.removesuffix(conversion.target_patterns[0])
    return {
        start + pattern.replace("*", str(expert)).removesuffix("weight") + kind: tensor
        for pattern in conversion.source_patterns
        for kind, (ids, tensor) in kinds.items()
        for expert in ids
    }
