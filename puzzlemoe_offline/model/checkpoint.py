"""Reading a Hugging Face folder tensor by tensor: dense or packed, per-expert or fused expert tensors."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_offline.model.families import Family, family_of
from puzzlemoe_vllm.errors import UserError
from puzzlemoe_vllm.format.codes import PairCode, get_code
from puzzlemoe_vllm.format.layout import (
    QUANT_METHOD,
    STEPS,
    WORDS,
    PuzzleConfig,
    parse_config,
    steps_name,
    weight_name,
    words_name,
)

INDEX = "model.safetensors.index.json"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class CheckpointError(UserError):
    """A checkpoint that cannot be read; the text names the file or tensor and the way out."""


@dataclass(frozen=True)
class LayerTensors:
    """Tensor names of one decoder layer, sorted: those of its routed experts, and the others.

    block: the MoE block's name on disk, e.g. `model.layers.3.mlp`; None in a layer without routed experts.
    """

    experts: tuple[str, ...]
    plain: tuple[str, ...]
    block: str | None


class Checkpoint:
    """A model folder, opened by header only; tensors are read (memory-mapped) when asked for."""

    def __init__(self, folder: Path):
        """Raises CheckpointError for a missing or damaged file, UnsupportedModel for a foreign family and LayoutError
        for a packed model of another version."""
        self.folder = folder
        self.config: dict[str, Any] = _read_json(folder / "config.json")
        self.family: Family = family_of(self.config)
        self.quantization = self._quantization()
        self._files = _open_files(folder)
        self._where = {name: file for file, handle in self._files.items() for name in handle.keys()}  # noqa: SIM118
        self.layers = self._size("num_hidden_layers")
        key = self.family.experts_key(self.config)
        self.experts = self._size(key)
        if self.experts < 2:
            raise CheckpointError(f"{folder / 'config.json'}: {key} is {self.experts}, nothing to merge")
        for layer, centres in (self.quantization.clusters if self.quantization else {}).items():
            if len(centres) != self.experts:
                raise CheckpointError(
                    f"{folder / 'config.json'}: quantization_config has clusters of {len(centres)} experts in layer "
                    f"{layer}, the model has {self.experts}: copy it again"
                )
        self._layers, self.outside = self._index()
        if not self.moe_layers:
            raise CheckpointError(f"{folder}: no expert tensors found for model_type {self.config['model_type']!r}")

    def _quantization(self) -> PuzzleConfig | None:
        raw = self.config.get("quantization_config")
        if raw is None:
            return None
        where = f"{self.folder / 'config.json'}: quantization_config"
        if not isinstance(raw, dict):
            raise CheckpointError(f"{where} is {raw!r}, expected a JSON object: copy it again")
        if raw.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(
                f"{where}: already quantized with {raw.get('quant_method')!r}; start from the 16-bit original"
            )
        return parse_config(raw, where)

    def _size(self, key: str) -> int:
        """A size that config.json holds."""
        size = self.config.get(key)
        if not isinstance(size, int) or size < 1:
            raise CheckpointError(
                f"{self.folder / 'config.json'}: {key} is {size!r}, expected a positive number: copy it again"
            )
        return size

    def _index(self) -> tuple[list[LayerTensors], tuple[str, ...]]:
        """Tensor names by decoder layer, and those outside layers: embedding, final norm and head."""
        experts: list[list[str]] = [[] for _ in range(self.layers)]
        plain: list[list[str]] = [[] for _ in range(self.layers)]
        blocks: dict[int, str] = {}
        outside = []
        for name in sorted(self._where):
            match = re.match(r"(model\.layers\.(\d+)\.(\w+))\.(experts\.)?", name)
            layer = int(match[2]) if match else self.layers
            if not match or layer >= self.layers:
                outside.append(name)
            elif match[4]:
                experts[layer].append(name)
                if match[3] in (self.family.block, "mlp"):
                    blocks[layer] = match[1]
            else:
                plain[layer].append(name)
        tensors = zip(experts, plain, strict=True)
        layers = [
            LayerTensors(tuple(routed), tuple(other), blocks.get(layer))
            for layer, (routed, other) in enumerate(tensors)
        ]
        return layers, tuple(outside)

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._where)

    def layer(self, index: int) -> LayerTensors:
        """Names of a decoder layer's tensors."""
        return self._layers[index]

    @functools.cached_property
    def moe_layers(self) -> list[int]:
        """Decoder layers that hold routed experts."""
        return [index for index, layer in enumerate(self._layers) if layer.block]

    def block(self, layer: int) -> str:
        """Name on disk of a layer's MoE block, e.g. `model.layers.3.mlp`."""
        block = self._layers[layer].block
        assert block
        return block

    @property
    def code(self) -> PairCode:
        """The code of a packed model's pairs."""
        assert self.quantization and self.quantization.code, "a dense model, or one in clusters, has no code"
        return get_code(self.quantization.code)

    def merged(self, layer: int) -> int:
        """Number of the layer's experts that are stored in pairs (0 in a dense checkpoint)."""
        return self.quantization.merged_experts.get(layer, 0) if self.quantization else 0

    def centre(self, layer: int, expert: int) -> int:
        """The expert whose tensors serve for an expert: another one where experts were merged in clusters."""
        centres = self.quantization.clusters.get(layer) if self.quantization else None
        return centres[expert] if centres else expert

    def file_of(self, name: str) -> str:
        """File name that holds a tensor."""
        return self._where[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        return tuple(self._slice(name).get_shape())

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor, from its file's header."""
        bits = {
            "BF16": 16,
            "F16": 16,
            "F32": 32,
            "F64": 64,
            "I8": 8,
            "U8": 8,
            "I16": 16,
            "I32": 32,
            "I64": 64,
            "BOOL": 8,
            "F8_E4M3": 8,
            "F8_E5M2": 8,
            "U16": 16,
            "U32": 32,
            "U64": 64,
        }[self._slice(name).get_dtype()]
        return int(torch.Size(self.shape(name)).numel()) * bits // 8

    def tensor(self, name: str) -> Tensor:
        """A tensor as stored.  Raises CheckpointError when it is missing."""
        self._require(name)
        tensor: Tensor = self._files[self._where[name]].get_tensor(name)
        return tensor

    def plain_tensor(self, name: str) -> Tensor:
        """A tensor that belongs to no merged expert, as stored.  Raises CheckpointError when it is missing, is not
        finite, or has less than 16 bits."""
        tensor = self.tensor(name)
        if tensor.is_floating_point() and tensor.itemsize < 2:
            raise CheckpointError(f"{name}: dtype {tensor.dtype} is quantized; start from the 16-bit original")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} in {self.file_of(name)} holds NaN or infinite values: fetch it again")
        return tensor

    def expert(self, layer: int, expert: int, device: str = "cpu") -> Expert:
        """The reconstructed bf16 weights of one routed expert, on a device.

        Raises CheckpointError for a missing tensor, a wrong shape or dtype, or a NaN or infinite weight.
        """
        return Expert(*(self._projection(layer, expert, index, device) for index in range(3)))

    def _projection(self, layer: int, expert: int, index: int, device: str) -> Tensor:
        experts, projection = f"{self.block(layer)}.experts", self.family.projections[index]
        if expert < self.merged(layer):
            words = self.pair_words(layer, expert & ~1, projection).to(device)
            steps = self.pair_steps(layer, expert & ~1, projection)
            return self.code.decode(words, expert & 1, None if steps is None else steps.to(device))
        fused = f"{experts}." + ("down_proj" if index == 2 else "gate_up_proj")
        if fused in self._where:
            weight: Tensor = self._slice(fused)[expert]
            if index < 2:
                weight = weight.chunk(2)[index]
            name = f"{fused}[{expert}]"
        else:
            name = weight_name(experts, self.centre(layer, expert), projection)
            weight = self.tensor(name)
        if weight.dtype not in FLOATS:
            raise CheckpointError(
                f"{name}: dtype {weight.dtype} is not bf16, fp16 or fp32; start from the 16-bit original"
            )
        self._check_shape(name, tuple(weight.shape), index)
        weight = weight.to(device, torch.bfloat16)
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(
                f"{name} in {self.folder} holds NaN or infinite values: fetch or convert the source again"
            )
        return weight.contiguous()

    def pair_words(self, layer: int, leader: int, projection: str) -> Tensor:
        """The stored words of a pair.  Raises CheckpointError for a missing tensor, a wrong dtype or shape."""
        name = words_name(f"{self.block(layer)}.experts", leader, projection)
        words, code = self.tensor(name), self.code
        if words.dtype != code.dtype:
            raise CheckpointError(f"{name}: dtype {words.dtype}, {code.name} words are {code.dtype}")
        self._check_shape(name, tuple(words.shape), self.family.projections.index(projection))
        return words

    def pair_steps(self, layer: int, leader: int, projection: str) -> Tensor | None:
        """The stored steps of a pair; None for a code without steps.  Raises CheckpointError for a missing tensor, a
        wrong dtype or shape, or a NaN or infinite step."""
        assert self.quantization is not None
        if self.quantization.group_size is None:
            return None
        name = steps_name(f"{self.block(layer)}.experts", leader, projection)
        steps = self.tensor(name)
        if steps.dtype != torch.bfloat16:
            raise CheckpointError(f"{name}: dtype {steps.dtype}, steps are {torch.bfloat16}")
        self._check_shape(name, tuple(steps.shape), self.family.projections.index(projection))
        if not bool(torch.isfinite(steps).all()):
            raise CheckpointError(f"{name} in {self.folder} holds NaN or infinite values: copy it again")
        return steps

    def _check_shape(self, name: str, shape: tuple[int, ...], index: int) -> None:
        if shape != (expected := self._expected_shape(name, index)):
            raise CheckpointError(f"{name}: shape {shape}, config.json says {expected}")

    def _expected_shape(self, name: str, index: int) -> tuple[int, ...]:
        """Of a tensor of one gate (0), up (1) or down (2) projection: weights, words or steps."""
        hidden, intermediate = self.expert_sizes
        rows, columns = (hidden, intermediate) if index == 2 else (intermediate, hidden)
        if self.quantization and name.endswith(f".{WORDS}"):
            return self.code.words_shape(rows, columns)
        if self.quantization and self.quantization.group_size and name.endswith(f".{STEPS}"):
            return rows, columns // self.quantization.group_size
        return rows, columns

    def check_complete(self) -> None:
        """Every tensor of a router or a routed expert is there, with the right shape, and no tensor of an expert that
        config.json does not know; headers only.  Raises CheckpointError."""
        for layer, tensors in enumerate(self._layers):
            shapes = self._expert_shapes(layer) if tensors.block else {}
            for name, shape in shapes.items():
                self.check_tensor(name, shape)
            if tensors.block:
                self.check_tensor(f"{tensors.block}.gate.weight", (self.experts, self.expert_sizes[0]))
            if unknown := [name for name in tensors.experts if name not in shapes]:
                raise CheckpointError(
                    f"{self.folder}: {unknown[0]} is none of the tensors that {self.config['model_type']} has with "
                    f"{self.experts} experts: config.json belongs to another model, or the model is no plain one"
                )

    def _expert_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that the layer's routed experts are stored in, by name."""
        experts, merged = f"{self.block(layer)}.experts", self.merged(layer)
        hidden, intermediate = self.expert_sizes
        if f"{experts}.gate_up_proj" in self._where:
            return {
                f"{experts}.gate_up_proj": (self.experts, 2 * intermediate, hidden),
                f"{experts}.down_proj": (self.experts, hidden, intermediate),
            }
        shapes: dict[str, tuple[int, ...]] = {}
        for index, projection in enumerate(self.family.projections):
            for expert in range(self.experts):
                if expert >= merged:
                    if self.centre(layer, expert) == expert:
                        name = weight_name(experts, expert, projection)
                        shapes[name] = self._expected_shape(name, index)
                elif expert % 2 == 0:
                    names = [words_name(experts, expert, projection)]
                    if self.quantization and self.quantization.group_size:
                        names.append(steps_name(experts, expert, projection))
                    shapes |= {name: self._expected_shape(name, index) for name in names}
        return shapes

    def check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError when a tensor is missing or has another shape; headers only."""
        self._require(name)
        if self.shape(name) != shape:
            raise CheckpointError(f"{name}: shape {self.shape(name)}, config.json says {shape}")

    def _require(self, name: str) -> None:
        if name not in self._where:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing: the download or the copy is incomplete")

    def _slice(self, name: str) -> Any:
        return self._files[self._where[name]].get_slice(name)

    @property
    def expert_sizes(self) -> tuple[int, int]:
        """Hidden and intermediate size of the routed experts."""
        return self._size("hidden_size"), self._size(self.family.intermediate)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one routed expert in bf16."""
        hidden, intermediate = self.expert_sizes
        return 3 * 2 * hidden * intermediate

    @property
    def routed_bytes(self) -> int:
        """Bytes of all routed experts in bf16."""
        return self.expert_bytes * self.experts * len(self.moe_layers)

    @property
    def other_bytes(self) -> int:
        """Bytes of everything but routed experts, as stored."""
        plain = [name for layer in self._layers for name in layer.plain]
        return sum(map(self.nbytes, [*plain, *self.outside]))

    @property
    def positions(self) -> int | None:
        """Longest sequence that the model was made for; None where config.json does not say."""
        positions = self.config.get("max_position_embeddings")
        return positions if isinstance(positions, int) and positions > 0 else None

    @property
    def experts_per_token(self) -> int:
        """Routed experts that the router chooses for a token."""
        return self._size("num_experts_per_tok")

    def fingerprint(self) -> str:
        """Digest of config.json and of every file's name, size and tensor table; weights are not read."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in self.names:
            digest.update(f"{name}|{self.shape(name)}|{self.file_of(name)}".encode())
        for file in sorted(self._files):
            status = (self.folder / file).stat()
            digest.update(f"{file}|{status.st_size}|{status.st_mtime_ns}".encode())
        return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: not a model folder, or an unfinished one") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): copy it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object: copy it again")
    return data


def _read_index(path: Path) -> dict[str, str]:
    """File by tensor name."""
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map of file names: copy it again")
    return weight_map


def _open_files(folder: Path) -> dict[str, Any]:
    """Handles of the safetensors files that make up the model; every file and tensor that the index names must be
    there."""
    index = folder / INDEX
    weight_map = _read_index(index) if index.exists() else {}
    files = sorted(set(weight_map.values()) if index.exists() else {path.name for path in folder.glob("*.safetensors")})
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors files; convert other weight formats to safetensors first")
    handles = {}
    for file in files:
        path = folder / file
        if not path.exists():
            raise CheckpointError(f"{path} is missing, but {INDEX} names it: the download or the copy is incomplete")
        try:
            handles[file] = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or cut short ({error}): copy or download it again") from None
    held = {file: set(handle.keys()) for file, handle in handles.items()}
    for name, file in weight_map.items():
        if name not in held[file]:
            raise CheckpointError(f"{folder / file}: tensor {name} is missing, but {INDEX} names it: copy it again")
    return handles
