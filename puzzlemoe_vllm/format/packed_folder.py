"""Whether a packed folder holds what was written, as far as the headers of its shards tell."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from puzzlemoe_vllm.errors import shown
from puzzlemoe_vllm.format.codes import get_code
from puzzlemoe_vllm.format.files import fault, read_json_object
from puzzlemoe_vllm.format.fp8 import FP8_BLOCK, FP8_SCALE, scale_shape, scales_name
from puzzlemoe_vllm.format.headers import FP8_DTYPES, ShardHeader, TensorInfo, read_header
from puzzlemoe_vllm.format.layout import (
    EXPERT_COUNTS,
    FORMAT_VERSION,
    STEPS,
    WORDS,
    PuzzleConfig,
    decoder_layer,
    layout_digest,
)
from puzzlemoe_vllm.format.shards import CODE_KEY, INDEX, VERSION_KEY, PackedMetadata, index_of

STORED_DTYPES = {"int16": "I16", "uint8": "U8"}
"""safetensors' names of the dtypes that words have."""


def check_headers(
    folder: Path, config: PuzzleConfig, found: dict[str, ShardHeader] | None = None
) -> dict[str, ShardHeader]:
    """Headers by file name of a packed folder that holds exactly what was written, as far as headers tell.

    config: `quantization_config` of its config.json.  found: headers of files that are not in the folder.
    Raises LayoutError: one line that names the file or tensor and the way out.
    """
    weight_map, metadata = index_of(folder, PackedMetadata)
    _check_no_others(folder, metadata.shards)
    headers = {}
    for name, record in sorted(metadata.shards.items()):
        header = headers[name] = read_header(folder / name) if found is None else found[name]
        _check_metadata(folder / name, header.metadata, config)
        if header.sha256 != record.header_sha256 or header.bytes != record.bytes:
            raise fault(
                folder / name,
                f"its tensors are not those that {INDEX} was written with{_difference(name, header, weight_map)}: "
                "it was changed or belongs to another model; copy or download the folder again",
            )
        for tensor in header.tensors:
            if weight_map.get(tensor) != name:
                raise fault(folder / INDEX, f"does not name tensor {shown(tensor)} of {shown(name)}: copy it again")
    held = sum(len(header.tensors) for header in headers.values())
    if held != len(weight_map):
        tensor = next(name for name, file in weight_map.items() if name not in headers[file].tensors)
        raise fault(folder / weight_map[tensor], f"tensor {shown(tensor)} is missing: copy or download it again")
    _check_experts(folder, headers, config)
    _check_fp8(folder, headers, config)
    if layout_digest(config) != metadata.layout_sha256:
        raise fault(
            folder / "config.json",
            "quantization_config is not the one that the model was written with: it was edited, or belongs to another "
            "model; copy or download it again",
        )
    return headers


def _difference(file: str, header: ShardHeader, weight_map: dict[str, str]) -> str:
    """How the tensors of a changed shard differ by name, as a message goes on."""
    named = {name for name, where in weight_map.items() if where == file}
    if lost := sorted(named - header.tensors.keys()):
        return f" ({shown(lost[0])} is missing)"
    if strays := sorted(header.tensors.keys() - named):
        return f" ({shown(strays[0])} is not the model's)"
    return ""


def _check_no_others(folder: Path, shards: Iterable[str]) -> None:
    """No other weights that some loader would read instead, or as well."""
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in shards:
            raise fault(
                path, f"is none of the files that {INDEX} names, but loaders may read it: move it out of the folder"
            )


def _check_metadata(path: Path, metadata: dict[str, str], config: PuzzleConfig) -> None:
    if (version := metadata.get(VERSION_KEY)) != str(FORMAT_VERSION):
        found = f"is of format version {shown(version, 20)}" if version else "is no shard of a packed model"
        raise fault(path, f"{found}, config.json is of {FORMAT_VERSION}: copy the folder again or compress again")
    if (code := metadata.get(CODE_KEY)) != config.code:
        raise fault(
            path,
            f"holds {shown(code, 20)} words, config.json says {config.code}: it was edited or belongs to another "
            "model; copy or download it again",
        )


@dataclass(frozen=True)
class _ExpertTensor:
    name: str
    file: str
    info: TensorInfo


def _check_experts(folder: Path, headers: dict[str, ShardHeader], config: PuzzleConfig) -> None:
    """The routed experts' tensors are exactly those that config.json names, in the dtypes and shapes that fit."""
    layers: dict[int, dict[tuple[int, str, str], _ExpertTensor]] = {}
    projections: set[str] = set()
    for file, header in headers.items():
        for name, info in header.tensors.items():
            layer, (_, found, below) = decoder_layer(name), name.partition(".experts.")
            if layer is None or not found:
                continue
            part = re.fullmatch(r"(\d{1,9})\.(\w+)\.(\w+)", below)
            if part is None or part[3] not in (WORDS, STEPS, "weight"):
                if layer in config.merged_experts or layer in config.clusters:
                    raise fault(folder / file, f"{shown(name)} is no tensor of a packed layer: compress again")
                continue
            projections.add(part[2])
            layers.setdefault(layer, {})[int(part[1]), part[2], part[3]] = _ExpertTensor(name, file, info)
    count = _expert_count(folder)
    for layer in sorted(config.merged_experts.keys() | config.clusters.keys() | layers.keys()):
        _check_layer(folder, layer, layers.get(layer, {}), projections, count, config)


def _expert_count(folder: Path) -> int | None:
    """Routed experts of a layer, from config.json; None when it does not say."""
    config = read_json_object(folder / "config.json")
    fields = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(fields, dict)
    counts = (fields.get(key) for key in EXPERT_COUNTS)
    return next((count for count in counts if type(count) is int and count > 0), None)


def _check_layer(
    folder: Path,
    layer: int,
    tensors: dict[tuple[int, str, str], _ExpertTensor],
    projections: set[str],
    count: int | None,
    config: PuzzleConfig,
) -> None:
    merged, centres = config.merged_experts.get(layer, 0), config.clusters.get(layer)
    leaders, kept = ({expert for expert, _, kind in tensors if (kind == "weight") == dense} for dense in (False, True))
    total = len(centres) if centres else count if count is not None else max(kept | {merged - 1}) + 1
    where = f"layer {layer} of config.json's quantization_config"
    if merged > total:
        raise fault(folder / "config.json", f"merges {merged} experts of layer {layer}, the model has {total}")
    if count is not None and total != count:
        raise fault(folder / "config.json", f"clusters of {total} experts in layer {layer}, the model has {count}")
    # One more than there are is enough to be missed: sizes in config.json may be anything.
    dense = set(centres) if centres else set(range(merged, min(total, merged + len(kept) + 1)))
    pairs = range(min(merged // 2, len(leaders) + 1))
    stored = [(2 * pair, kind) for pair in pairs for kind in (WORDS, *((STEPS,) if config.group_size else ()))]
    expected = {
        (expert, projection, kind)
        for expert, kind in [*stored, *((expert, "weight") for expert in sorted(dense))]
        for projection in projections
    }
    advice = "config.json was edited or belongs to another model; copy or download the folder again"
    if strays := sorted(tensors.keys() - expected):
        stray = tensors[strays[0]]
        raise fault(folder / stray.file, f"holds {shown(stray.name)}, which {where} does not name: {advice}")
    if missing := sorted(expected - tensors.keys()):
        expert, projection, kind = missing[0]
        raise fault(folder, f"has no {kind} of expert {expert}, {shown(projection, 40)}, which {where} names: {advice}")
    for projection in projections if merged or centres else ():
        _check_projection(folder, {key: tensor for key, tensor in tensors.items() if key[1] == projection}, config)


def _check_projection(folder: Path, tensors: dict[tuple[int, str, str], _ExpertTensor], config: PuzzleConfig) -> None:
    """The tensors of one projection in one layer have the dtypes of their kind and all the same size."""
    code = get_code(config.code) if config.code else None
    sizes: tuple[int, ...] | None = None
    for (_, _, kind), tensor in sorted(tensors.items(), key=lambda item: (item[0][2] == STEPS, item[0])):
        dtype, shape = "BF16", tensor.info.shape
        unpacked: tuple[int, ...] | None = shape if len(shape) == 2 else None
        if kind == WORDS and code is not None:
            dtype = STORED_DTYPES[str(code.dtype).removeprefix("torch.")]
            unpacked = code.matrix_shape((shape[0], shape[1])) if len(shape) == 2 else None
        elif kind == STEPS and config.group_size and unpacked:
            unpacked = (shape[0], shape[1] * config.group_size)
        if tensor.info.dtype != dtype:
            raise fault(
                folder / tensor.file,
                f"{shown(tensor.name)} is of dtype {tensor.info.dtype}, expected {dtype}: compress the source again",
            )
        sizes = sizes or unpacked
        if unpacked is None or unpacked != sizes:
            raise fault(
                folder / tensor.file,
                f"{shown(tensor.name)} of shape {shown(shape)} does not fit the layer's experts of {sizes}: "
                "compress the source again",
            )


def _check_fp8(folder: Path, headers: dict[str, ShardHeader], config: PuzzleConfig) -> None:
    """The tensors in FP8 are exactly the layers that config.json names, and each has its scales."""
    weights = {f"{layer}.weight" for layer in config.fp8}
    found = {name: (file, info) for file, header in headers.items() for name, info in header.tensors.items()}
    scales = {scales_name(name): name for name in weights}
    for name, (file, info) in found.items():
        if (info.dtype in FP8_DTYPES and name not in weights) or (name.endswith(FP8_SCALE) and name not in scales):
            raise fault(
                folder / file,
                f"holds {shown(name)}, but config.json's quantization_config does not name its layer in fp8: it was "
                "edited or belongs to another model; copy or download the folder again",
            )
    for scale, weight in scales.items():
        for name in (weight, scale):
            if name not in found:
                raise fault(folder, f"has no {shown(name)}, whose layer config.json's quantization_config has in fp8")
        (file, stored), (_, held) = found[weight], found[scale]
        shape = scale_shape(stored.shape, (FP8_BLOCK, FP8_BLOCK)) if len(stored.shape) == 2 else None
        if stored.dtype != FP8_DTYPES[0] or held != TensorInfo("F32", shape or ()):
            raise fault(
                folder / file,
                f"{shown(weight)} is {stored.dtype} {shown(stored.shape)} and {held.dtype} {shown(held.shape)}: "
                f"expected {FP8_DTYPES[0]}, and F32 for its blocks; compress the source again",
            )
