"""Reading a Hugging Face folder tensor by tensor: dense or packed, per-expert or fused expert tensors."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from puzzlemoe_offline.families import Family, family_of
from puzzlemoe_vllm.format.codes import get_code
from puzzlemoe_vllm.format.layout import (
    GRID,
    QUANT_METHOD,
    WORDS,
    PuzzleConfig,
    grid_name,
    parse_config,
    weight_name,
    words_name,
)

INDEX = "model.safetensors.index.json"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the text names the file or tensor and the way out."""


def locate(source: str, revision: str | None = None) -> Path:
    """The local folder of a model: a path, or a hub id (fetched into the hub cache).

    Raises CheckpointError when it is neither.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=["*.safetensors", *SMALL_FILES]))
    except (HFValidationError, RepositoryNotFoundError):
        raise CheckpointError(f"{source}: neither a folder here nor a model id on the hub") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{source}: no such folder, and the hub could not be reached ({error})") from None


SMALL_FILES = ("*.json", "*.jinja", "*.py", "*.model", "*.txt", "LICENSE*", "NOTICE*", "*.tiktoken")


PROJECTIONS = ("gate", "up", "down")
"""An expert's matrices, as `Expert` names them."""


@dataclass(frozen=True)
class Expert:
    """One routed expert's dense weights, bf16: gate and up [I, H], down [H, I]."""

    gate: Tensor
    up: Tensor
    down: Tensor

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down projection, as in `PROJECTIONS`."""
        return self.gate, self.up, self.down

    def to(self, device: torch.device | str) -> Expert:
        """The same weights on another device."""
        return Expert(self.gate.to(device), self.up.to(device), self.down.to(device))


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
        self.layers = int(self.config["num_hidden_layers"])
        key = self.family.experts_key(self.config)
        self.experts = int(self.config.get(key) or 0)
        if self.experts < 2:
            raise CheckpointError(f"{folder / 'config.json'}: {key} is {self.experts}, nothing to merge")
        for layer, centres in (self.quantization.clusters if self.quantization else {}).items():
            if len(centres) != self.experts:
                raise CheckpointError(
                    f"{folder / 'config.json'}: quantization_config has clusters of {len(centres)} experts in layer "
                    f"{layer}, the model has {self.experts}: copy it again"
                )
        self._blocks = {layer: block for layer in range(self.layers) if (block := self._find_block(layer))}
        if not self._blocks:
            raise CheckpointError(f"{folder}: no expert tensors found for model_type {self.config['model_type']!r}")

    def _quantization(self) -> PuzzleConfig | None:
        raw = self.config.get("quantization_config")
        if raw is None:
            return None
        where = f"{self.folder / 'config.json'}: quantization_config"
        if raw.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(
                f"{where}: already quantized with {raw.get('quant_method')!r}; start from the 16-bit original"
            )
        return parse_config(raw, where)

    def _find_block(self, layer: int) -> str | None:
        """Name of the layer's MoE block on disk; None for a layer without experts."""
        for block in dict.fromkeys((self.family.block, "mlp")):
            name = f"model.layers.{layer}.{block}"
            if f"{name}.experts.gate_up_proj" in self._where or any(
                key in self._where
                for key in (
                    words_name(f"{name}.experts", 0, self.family.gate),
                    *(weight_name(f"{name}.experts", expert, self.family.gate) for expert in range(self.experts)),
                )
            ):
                return name
        return None

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._where)

    @property
    def moe_layers(self) -> list[int]:
        """Decoder layers that hold routed experts."""
        return sorted(self._blocks)

    def block(self, layer: int) -> str:
        """Name on disk of the layer's MoE block, e.g. `model.layers.3.mlp`."""
        return self._blocks[layer]

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
        return self._files[self._where[name]].get_tensor(name)

    def expert(self, layer: int, expert: int) -> Expert:
        """The reconstructed bf16 weights of one routed expert.

        Raises CheckpointError for a missing tensor, a wrong shape or dtype, or a NaN or infinite weight.
        """
        return Expert(*(self._projection(layer, expert, index) for index in range(3)))

    def _projection(self, layer: int, expert: int, index: int) -> Tensor:
        experts, projection = f"{self.block(layer)}.experts", self.family.projections[index]
        if expert < self.merged(layer):
            words = self.pair_words(layer, expert & ~1, projection)
            grid = self.pair_grid(layer, expert & ~1, projection)
            assert self.quantization is not None
            return get_code(self.quantization.code).decode(words, expert & 1, grid)
        fused = f"{experts}." + ("down_proj" if index == 2 else "gate_up_proj")
        if fused in self._where:
            weight = self._slice(fused)[expert]
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
        weight = weight.to(torch.bfloat16)
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(
                f"{name} in {self.folder} holds NaN or infinite values: fetch or convert the source again"
            )
        return weight.contiguous()

    def pair_words(self, layer: int, leader: int, projection: str) -> Tensor:
        """The stored words of a pair.  Raises CheckpointError for a missing tensor, a wrong dtype or shape."""
        assert self.quantization is not None
        name = words_name(f"{self.block(layer)}.experts", leader, projection)
        words, code = self.tensor(name), get_code(self.quantization.code)
        if words.dtype != code.dtype:
            raise CheckpointError(f"{name}: dtype {words.dtype}, {code.name} words are {code.dtype}")
        self._check_shape(name, tuple(words.shape), self.family.projections.index(projection))
        return words

    def pair_grid(self, layer: int, leader: int, projection: str) -> Tensor | None:
        """The stored steps of a pair; None for a code without steps.  Raises CheckpointError for a missing tensor, a
        wrong dtype or shape, or a NaN or infinite step."""
        assert self.quantization is not None
        if self.quantization.group_size is None:
            return None
        name = grid_name(f"{self.block(layer)}.experts", leader, projection)
        grid = self.tensor(name)
        if grid.dtype != torch.bfloat16:
            raise CheckpointError(f"{name}: dtype {grid.dtype}, steps are {torch.bfloat16}")
        self._check_shape(name, tuple(grid.shape), self.family.projections.index(projection))
        if not bool(torch.isfinite(grid).all()):
            raise CheckpointError(f"{name} in {self.folder} holds NaN or infinite values: copy it again")
        return grid

    def _check_shape(self, name: str, shape: tuple[int, ...], index: int) -> None:
        hidden, intermediate = self.expert_sizes
        expected = (hidden, intermediate) if index == 2 else (intermediate, hidden)
        if self.quantization and name.endswith(f".{WORDS}"):
            expected = get_code(self.quantization.code).words_shape(*expected)
        elif self.quantization and self.quantization.group_size and name.endswith(f".{GRID}"):
            expected = (expected[0], expected[1] // self.quantization.group_size)
        if shape != expected:
            raise CheckpointError(f"{name}: shape {shape}, config.json says {expected}")

    def check_complete(self) -> None:
        """Every expert tensor is there, with the right shape and dtype; headers only.  Raises CheckpointError."""
        has_grid = self.quantization is not None and self.quantization.group_size is not None
        for layer in self.moe_layers:
            experts = f"{self.block(layer)}.experts"
            merged = self.merged(layer)
            if f"{experts}.gate_up_proj" in self._where:
                self._require(f"{experts}.down_proj")
                continue
            for index, projection in enumerate(self.family.projections):
                for expert in range(self.experts):
                    paired = expert < merged
                    if (paired and expert % 2) or self.centre(layer, expert) != expert:
                        continue
                    names = [(words_name if paired else weight_name)(experts, expert, projection)]
                    if paired and has_grid:
                        names.append(grid_name(experts, expert, projection))
                    for name in names:
                        self._require(name)
                        self._check_shape(name, self.shape(name), index)
        self._require(f"{self.block(self.moe_layers[0])}.gate.weight")

    def _require(self, name: str) -> None:
        if name not in self._where:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing: the download or the copy is incomplete")

    def _slice(self, name: str) -> Any:
        return self._files[self._where[name]].get_slice(name)

    def is_expert(self, name: str) -> bool:
        """Whether a tensor belongs to a routed expert."""
        return re.match(r"model\.layers\.\d+\.\w+\.experts\.", name) is not None

    def layer_of(self, name: str) -> int | None:
        """Decoder layer that a tensor belongs to; None for embeddings, final norm and head."""
        match = re.match(r"model\.layers\.(\d+)\.", name)
        layer = int(match[1]) if match else None
        return layer if layer is not None and layer < self.layers else None

    @property
    def expert_sizes(self) -> tuple[int, int]:
        """Hidden and intermediate size of the routed experts."""
        return int(self.config["hidden_size"]), int(self.config[self.family.intermediate])

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
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: not a model folder, or an unfinished one") from None
    except (json.JSONDecodeError, TypeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): copy it again") from None


def _open_files(folder: Path) -> dict[str, Any]:
    """Handles of the safetensors files that make up the model; every file that the index names must open."""
    index = folder / INDEX
    files = (
        sorted(set(_read_json(index)["weight_map"].values()))
        if index.exists()
        else sorted(path.name for path in folder.glob("*.safetensors"))
    )
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
    return handles
