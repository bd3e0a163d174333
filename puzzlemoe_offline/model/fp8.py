"""FP8 weights and their scales: the forms that checkpoints have, and the bf16 that they stand for.

Forms are those of DeepSeek-V3 and what follows it (`quant_method` fp8, a scale a block), of AutoFP8 (the same, a scale
a tensor), and of llm-compressor (compressed-tensors float-quantized, a scale a row, tensor or block).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from puzzlemoe_offline.finite import all_finite
from puzzlemoe_vllm.errors import UserError, shown
from puzzlemoe_vllm.format.fp8 import FP8_BLOCK, scale_shape
from puzzlemoe_vllm.format.headers import TensorInfo

FP8 = "F8_E4M3"
"""dtype of FP8 weights, as headers spell it."""

SCALES = ("F32", "BF16", "F16", "F8_E8M0")
"""dtypes that scales may have."""

ACTIVATIONS = ".input_scale"
"""What names end with of scales for the inputs of FP8 products; with bf16 weights there are none."""

OF_WEIGHTS = (".weight_scale", ".weight_scale_inv", "_proj_scale", "_proj_scale_inv")
"""What names of weights' scales end with."""


class Fp8Error(UserError):
    """FP8 weights that cannot be read; the text names the tensor and the way out."""


@dataclass(frozen=True)
class Fp8Form:
    """How the FP8 weights of a model are scaled.

    suffix: what a weight's name is followed by in its scale's.  block: rows and columns of a weight that share a scale;
    None stands for all of them.
    """

    suffix: str
    block: tuple[int | None, int | None]

    def scale_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """What the scales of weights [..., N, K] may have as shape: a single one may have no dimensions, or one."""
        whole = self.block == (None, None) and len(shape) == 2
        return [scale_shape(shape, self.block), *([(1,), ()] if whole else [])]


BLOCKS = Fp8Form("_scale_inv", (FP8_BLOCK, FP8_BLOCK))
"""DeepSeek-V3's, which vLLM serves on every GPU that the plugin runs on; packed models hold no other."""


def form_of(quantization: Any) -> Fp8Form | None:
    """The form that a config.json's `quantization_config` says; None for anything else than FP8 weights."""
    match quantization:
        case {"quant_method": "fp8", "weight_block_size": [int(rows), int(columns)]} if rows > 0 and columns > 0:
            return Fp8Form("_scale_inv", (rows, columns))
        case {"quant_method": "fp8"} if quantization.get("weight_block_size") is None:
            return Fp8Form("_scale", (None, None))
        case {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {**groups}} if groups:
            forms = {_form_of_group(group) for group in groups.values()}
            return forms.pop() if len(forms) == 1 and not _is_sparse(quantization) else None
    return None


def _form_of_group(group: object) -> Fp8Form | None:
    """That of one of compressed-tensors' `config_groups`."""
    match group:
        case {"weights": {"num_bits": 8, "type": "float", "strategy": strategy, **rest}} if rest.get("symmetric", True):
            match strategy, rest.get("block_structure"):
                case "tensor", _:
                    return Fp8Form("_scale", (None, None))
                case "channel", _:
                    return Fp8Form("_scale", (1, None))
                case "block", [int(rows), int(columns)] if rows > 0 and columns > 0:
                    return Fp8Form("_scale", (rows, columns))
    return None


def _is_sparse(quantization: Mapping[str, Any]) -> bool:
    """Whether compressed-tensors left zeros out as well."""
    sparsity = quantization.get("sparsity_config")
    return isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense"


def find_scales(tensors: Mapping[str, TensorInfo], form: Fp8Form, config: str) -> dict[str, str]:
    """The scale's name of each FP8 weight.  config: the file that says the form.

    Raises Fp8Error when a scale is missing, of another shape or dtype, or no FP8 weight's.
    """
    scales = {}
    for name, info in tensors.items():
        if info.dtype == FP8:
            scales[name] = _scale_of(name, info, tensors, form)
    if not scales:
        raise Fp8Error(
            f"{config}: quantization_config says FP8, but no tensor is: drop it if the weights were converted, or copy "
            "the folder again"
        )
    used = set(scales.values())
    for name in tensors:
        stray = name.endswith(OF_WEIGHTS) and name not in used
        if stray or (name.endswith(ACTIVATIONS) and f"{name.removesuffix(ACTIVATIONS)}.weight" not in scales):
            raise Fp8Error(
                f"tensor {shown(name, 80)} is the scale of no FP8 weight: the files belong to two models, or weights "
                "were converted and kept their scales; copy or download the folder again"
            )
    return scales


def _scale_of(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo], form: Fp8Form) -> str:
    scale = name + form.suffix
    if len(info.shape) < 2:
        raise Fp8Error(f"tensor {shown(name, 80)} is FP8 of shape {shown(info.shape)}, no matrix: fetch it again")
    if scale not in tensors:
        raise Fp8Error(
            f"tensor {shown(name, 80)} is FP8, but its scale {shown(scale, 80)} is missing: the download or the copy "
            "is incomplete"
        )
    found, shapes = tensors[scale], form.scale_shapes(info.shape)
    if found.shape not in shapes or found.dtype not in SCALES:
        raise Fp8Error(
            f"tensor {shown(scale, 80)} is {found.dtype} {shown(found.shape)}, but config.json asks for "
            f"{' or '.join(map(str, shapes))} of {', '.join(SCALES)}: copy or download the folder again"
        )
    return scale


def check_scale(name: str, scale: Tensor) -> None:
    """Raises Fp8Error for a scale that is NaN or infinite."""
    if not all_finite(scale.float()):
        raise Fp8Error(f"tensor {shown(name, 80)} holds NaN or infinite scales: fetch it again")
