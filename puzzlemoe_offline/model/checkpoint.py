"""Reading a Hugging Face folder tensor by tensor: dense or packed, per-expert or fused expert tensors."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from puzzlemoe_offline.finite import all_finite
from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_offline.model.families import MTP, Family, family_of
from puzzlemoe_offline.model.fp8 import ACTIVATIONS, BLOCKS, Fp8Form, check_scale, find_scales, form_of
from puzzlemoe_offline.model.other_formats import (
    ORIGINAL,
    check_not_quantized,
    check_tensor_names,
    no_config_reason,
)
from puzzlemoe_offline.model.weight_files import CheckpointError, read_headers
from puzzlemoe_vllm.errors import shown
from puzzlemoe_vllm.format.codes import PairCode, get_code
from puzzlemoe_vllm.format.files import read_json_object
from puzzlemoe_vllm.format.fp8 import dequantize
from puzzlemoe_vllm.format.headers import DTYPE_BITS, FP8_DTYPES, ShardHeader, TensorInfo
from puzzlemoe_vllm.format.layout import (
    STEPS,
    WORDS,
    PuzzleConfig,
    parse_config,
    steps_name,
    weight_name,
    words_name,
)
from puzzlemoe_vllm.format.packed_folder import check_headers

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""dtypes that weights may have, by their names in headers."""

LARGEST_CONFIG = 10_000_000
"""Bytes of a config.json."""

OPEN_FILES = 4
"""Files of weights that are open at a time: two layers, one being read ahead, may lie in two each."""

RECOMPUTED = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
"""What names of tensors end with that old checkpoints hold and no loader reads."""

SIZE_KEYS = ("_dim", "_rank", "_heads", "_experts", "hidden_size", "intermediate_size", "vocab_size")
"""What keys of config.json end with that hold the size of some tensor."""


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

    def __init__(self, folder: Path, headers: dict[str, ShardHeader] | None = None):
        """headers: of the weight files, by name, where the folder has no weights yet: sizes and names are known then,
        but no tensor can be read.

        Raises UserError: CheckpointError for a missing or damaged file, UnsupportedModel for a foreign family,
        ForeignFormat for one in another format, and LayoutError for a packed model of another version or one that is
        not what was written.
        """
        self.folder = folder
        if not (folder / "config.json").exists():
            raise CheckpointError(f"{shown(folder / 'config.json', 200)} {no_config_reason(folder)}")
        self.config: dict[str, Any] = read_json_object(folder / "config.json", LARGEST_CONFIG)
        check_not_quantized(folder, self.config)
        self.family: Family = family_of(self.config)
        self.text = self.family.text(self.config)
        self.quantization = self._quantization()
        self.has_weights = headers is None
        if self.quantization:
            headers = check_headers(folder, self.quantization, headers)
        elif headers is None:
            headers = read_headers(folder)
        self._headers = headers
        self._where = {name: file for file, header in headers.items() for name in header.tensors}
        self.fp8 = self._fp8_form()
        self._scales = self._find_scales() if self.fp8 else {}
        check_tensor_names(folder, self.names, self.family.prefix)
        self._check_sizes()
        self.layers = self._size("num_hidden_layers")
        key = self.family.experts_key(self.text)
        self.experts = self._size(key)
        if self.experts < 2:
            raise CheckpointError(f"{self._config_path}: {key} is {self.experts}, nothing to merge")
        if self.experts_per_token > self.experts:
            raise CheckpointError(
                f"{self._config_path}: a token chooses {self.experts_per_token} of {self.experts} experts: copy it "
                "again"
            )
        self._layers, self.outside, self.copied = self._by_layer()
        if not self.moe_layers:
            raise CheckpointError(
                f"{shown(folder, 200)}: no expert tensors found for model_type {self.config['model_type']!r}"
            )

    @property
    def _config_path(self) -> str:
        """As messages name it."""
        return shown(self.folder / "config.json", 200)

    def _quantization(self) -> PuzzleConfig | None:
        """What config.json says of a packed model."""
        raw = self.config.get("quantization_config")
        if raw is None or form_of(raw):
            return None
        return parse_config(raw, f"{self._config_path}: quantization_config")

    def _fp8_form(self) -> Fp8Form | None:
        """How FP8 weights are scaled; None in a model that says that it has none."""
        if self.quantization:
            return BLOCKS if self.quantization.fp8 else None
        return form_of(self.config.get("quantization_config"))

    def _find_scales(self) -> dict[str, str]:
        """The scale's name of each FP8 weight.  Raises Fp8Error."""
        assert self.fp8
        infos = {name: info for header in self._headers.values() for name, info in header.tensors.items()}
        return find_scales(infos, self.fp8, self._config_path)

    def _check_sizes(self) -> None:
        """No size in config.json is larger than every tensor: memory for such a model is not asked for."""
        shapes = [info.shape for header in self._headers.values() for info in header.tensors.values()]
        largest = max((max(shape) for shape in shapes if shape), default=0)
        for key, size in self.text.items():
            if key.endswith(SIZE_KEYS) and isinstance(size, int | float) and size > largest:
                raise CheckpointError(
                    f"{self._config_path}: {shown(key, 40)} is {shown(size, 40)}, but no tensor is larger than "
                    f"{largest}: copy it again"
                )

    def _size(self, key: str) -> int:
        """A size that the language model's config holds, or a list of one for each layer, which must be equal."""
        size = self.text.get(key)
        if isinstance(size, list) and size and all(one == size[0] for one in size):
            size = size[0]
        if type(size) is not int or size < 1:
            raise CheckpointError(
                f"{self._config_path}: {key} is {shown(repr(size), 60)}, expected a positive number: copy it again"
            )
        return size

    def _by_layer(self) -> tuple[list[LayerTensors], tuple[str, ...], dict[str, str]]:
        """Tensor names by decoder layer; those outside layers: embedding, final norm and head; and those of parts that
        are copied, with the part's name."""
        pattern = re.compile(rf"({re.escape(self.family.prefix)}layers\.([0-9]{{1,9}})\.(\w+))\.(.*)")
        places = {name: pattern.match(name) for name in self.names}
        found = len({match[2] for match in places.values() if match})
        if self.layers > found:
            raise CheckpointError(
                f"{self._config_path}: num_hidden_layers is {shown(self.layers, 40)}, but there are tensors of "
                f"{found}: the download or the copy is incomplete"
            )
        experts: list[list[str]] = [[] for _ in range(self.layers)]
        plain: list[list[str]] = [[] for _ in range(self.layers)]
        blocks: dict[int, str] = {}
        outside = []
        copied = {}
        for name, match in sorted(places.items()):
            layer = int(match[2]) if match else self.layers
            if not match or layer >= self.layers:
                if part := self._copied_part(name, layer if match else None):
                    copied[name] = part
                else:
                    outside.append(name)
            elif match[4].startswith("experts.") or match[4] in self.family.fused:
                experts[layer].append(name)
                if match[3] in (self.family.block, self.family.module):
                    blocks[layer] = match[1]
            else:
                plain[layer].append(name)
        tensors = zip(experts, plain, strict=True)
        layers = [
            LayerTensors(tuple(routed), tuple(other), blocks.get(layer))
            for layer, (routed, other) in enumerate(tensors)
        ]
        return layers, tuple(outside), copied

    def _copied_part(self, name: str, layer: int | None) -> str | None:
        """The part that a tensor outside the decoder belongs to, where it is copied.

        layer: of a name of a decoder layer, beyond the last.
        """
        if layer is not None:
            key = self.family.mtp_layers
            more = self.text.get(key) if key else None
            return MTP if isinstance(more, int) and layer < self.layers + more else None
        return next((part for start, part in self.family.copied.items() if name.startswith(start)), None)

    @functools.cached_property
    def names(self) -> list[str]:
        """All tensor names, sorted, but for the scales of FP8 weights, which belong to these."""
        scales = set(self._scales.values())
        return sorted(n for n in self._where if n not in scales and not (self.fp8 and n.endswith(ACTIVATIONS)))

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

    def router(self, layer: int) -> list[str]:
        """Names on disk of the tensors of a layer's router, its weight first; none in a layer without experts."""
        block = self._layers[layer].block
        return [f"{block}.{name}" for name in self.family.router] if block else []

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
        return self._info(name).shape

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor with its scale, from its file's header."""
        infos = [self._info(name), *([self._info(self._scales[name])] if name in self._scales else [])]
        return sum(math.prod(info.shape) * DTYPE_BITS[info.dtype] // 8 for info in infos)

    def _info(self, name: str) -> TensorInfo:
        return self._headers[self._where[name]].tensors[name]

    def tensor(self, name: str, part: int | None = None, device: str = "cpu") -> Tensor:
        """A tensor, or a part of it along its first dimension: as stored, but for FP8 weights, which are converted on a
        device to the bf16 that they stand for.

        Raises CheckpointError when it is missing or cannot be read, Fp8Error for a scale that is not finite.
        """
        stored = self.stored(name, part)
        if name not in self._scales:
            return stored
        assert self.fp8
        return dequantize(on_device(stored, device), self.scale(name, part).to(device), self.fp8.block)

    def in_blocks(self, name: str) -> bool:
        """Whether a tensor is in FP8 with a scale for each block of `FP8_BLOCK` rows and columns."""
        return name in self._scales and self.fp8 is not None and self.fp8.block == BLOCKS.block

    def scale(self, name: str, part: int | None = None) -> Tensor:
        """The scale of an FP8 weight as stored.  Raises as `tensor` does."""
        scale = self.stored(self._scales[name], part)
        check_scale(self._scales[name], scale)
        return scale

    def stored(self, name: str, part: int | None = None) -> Tensor:
        """A tensor, or a part of it along its first dimension, as it lies in the file.  Raises CheckpointError when it
        is missing or cannot be read."""
        if part is None:
            return self._read(name, lambda handle: handle.get_tensor(name))
        return self._read(name, lambda handle: handle.get_slice(name)[part])

    def _read(self, name: str, read: Callable[[Any], Tensor]) -> Tensor:
        """What is read of a tensor through its file's handle."""
        self._require(name)
        file = self._where[name]
        if not self.has_weights:
            raise CheckpointError(f"{shown(self.folder, 200)}: the weights of this model were not fetched")
        try:
            return read(self._opened(file))
        except (SafetensorError, OSError, AttributeError) as error:  # AttributeError: a dtype that torch lacks
            raise CheckpointError(
                f"{shown(self.folder / file, 200)}: tensor {shown(name, 80)} cannot be read ({shown(error, 80)}): copy "
                "or download it again"
            ) from None

    @functools.cached_property
    def _opened(self) -> functools._lru_cache_wrapper[Any]:
        """Opens a file by its name, or hands out the one that is open: the last `OPEN_FILES` are.

        A file that was read stays mapped while it is open, and its pages are given back when it is closed: the thread
        that reads ahead does that beside the work, the end of the process would do it for the whole model at once.
        """
        folder = self.folder  # not self, which would then live until the garbage collector comes
        return functools.lru_cache(OPEN_FILES)(lambda file: safe_open(folder / file, "pt"))

    def close(self) -> None:
        """Closes all files; one that is read again is opened again."""
        self._opened.cache_clear()

    def plain_tensor(self, name: str) -> Tensor:
        """A tensor that belongs to no merged expert, as `tensor` gives it.  Raises CheckpointError when it is missing,
        not finite, or of another dtype than `FLOATS` and no FP8 weight."""
        self._require(name)
        self._check_dtype(name)
        tensor = self.tensor(name)
        if not all_finite(tensor):
            raise CheckpointError(f"{shown(name)} in {self.file_of(name)} holds NaN or infinite values: fetch it again")
        return tensor

    def _check_dtype(self, name: str) -> None:
        if (dtype := self._info(name).dtype) not in FLOATS and name not in self._scales:
            raise CheckpointError(
                f"{shown(name)} in {shown(self.file_of(name))}: dtype {dtype} is not bf16, fp16 or fp32; {ORIGINAL}"
            )

    def expert(self, layer: int, expert: int, device: str = "cpu") -> Expert:
        """The reconstructed bf16 weights of one routed expert, on a device.

        Raises CheckpointError for a missing tensor, a wrong shape or dtype, or a NaN or infinite weight.
        """
        return Expert(*(self._projection(layer, expert, index, device) for index in range(3)))

    def _projection(self, layer: int, expert: int, index: int, device: str) -> Tensor:
        experts, projection = f"{self.block(layer)}.experts", self.family.projections[index]
        if expert < self.merged(layer):
            words = on_device(self.pair_words(layer, expert & ~1, projection), device)
            steps = self.pair_steps(layer, expert & ~1, projection)
            return self.code.decode(words, expert & 1, None if steps is None else steps.to(device))
        fused = f"{self.block(layer)}.{self.family.fused[index == 2]}"
        stored = fused if fused in self._where else weight_name(experts, self.centre(layer, expert), projection)
        self._require(stored)
        self._check_dtype(stored)
        if stored == fused:
            name = f"{fused}[{expert}]"
            weight = self.tensor(fused, expert, device)
            if index < 2:
                weight = weight.chunk(2)[index]
        else:
            name, weight = stored, self.tensor(stored, device=device)
        self._check_shape(name, tuple(weight.shape), index)
        weight = on_device(weight, device).to(torch.bfloat16)
        if not all_finite(weight):
            raise CheckpointError(
                f"{shown(name)} in {shown(self.folder, 200)} holds NaN or infinite values: fetch or convert the source "
                "again"
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
        if not all_finite(steps):
            raise CheckpointError(
                f"{shown(name)} in {shown(self.folder, 200)} holds NaN or infinite values: copy it again"
            )
        return steps

    def _check_shape(self, name: str, shape: tuple[int, ...], index: int) -> None:
        if shape != (expected := self._expected_shape(name, index)):
            raise CheckpointError(f"{shown(name)}: shape {shown(shape)}, config.json says {shown(expected)}")

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
        config.json does not know; all weights have a dtype of `FLOATS`; headers only.  Raises CheckpointError."""
        for layer, tensors in enumerate(self._layers):
            known = set()
            if tensors.block:
                weight, *more = self.router(layer)
                self.check_tensor(weight, (self.experts, self.expert_sizes[0]))
                for name in more:
                    self._require(name)
                    if self.experts not in self.shape(name):
                        self.check_tensor(name, (self.experts,))
                for name, shape in self._expert_shapes(layer):
                    self.check_tensor(name, shape)
                    known.add(name)
            if unknown := [name for name in tensors.experts if name not in known]:
                raise CheckpointError(
                    f"{shown(self.folder, 200)}: {shown(unknown[0])} is none of the tensors that "
                    f"{self.config['model_type']} has with {self.experts} experts: config.json belongs to another "
                    "model, or the model is no plain one"
                )
        for name in self.names:
            if not name.endswith((f".{WORDS}", f".{STEPS}")) and not self._is_copied_as_it_is(name):
                self._check_dtype(name)

    def _expert_shapes(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the tensors that the layer's routed experts are stored in."""
        experts, merged = f"{self.block(layer)}.experts", self.merged(layer)
        hidden, intermediate = self.expert_sizes
        gate_up, down = (f"{self.block(layer)}.{name}" for name in self.family.fused)
        if gate_up in self._where:
            yield gate_up, (self.experts, 2 * intermediate, hidden)
            yield down, (self.experts, hidden, intermediate)
            return
        for index, projection in enumerate(self.family.projections):
            for expert in range(self.experts):
                names = []
                if expert >= merged:
                    if self.centre(layer, expert) == expert:
                        names = [weight_name(experts, expert, projection)]
                elif expert % 2 == 0:
                    names = [words_name(experts, expert, projection)]
                    if self.quantization and self.quantization.group_size:
                        names.append(steps_name(experts, expert, projection))
                for name in names:
                    yield name, self._expected_shape(name, index)

    def check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError when a tensor is missing or has another shape; headers only."""
        self._require(name)
        if self.shape(name) != shape:
            raise CheckpointError(f"{shown(name)}: shape {shown(self.shape(name))}, config.json says {shown(shape)}")

    def _require(self, name: str) -> None:
        if name not in self._where:
            raise CheckpointError(
                f"{shown(self.folder, 200)}: tensor {shown(name)} is missing: the download or the copy is incomplete"
            )

    @functools.cached_property
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

    def stored_bytes(self, routed: bool) -> int:
        """Bytes of all routed experts, or of everything else, as they lie in the files."""
        names = [name for layer in self._layers for name in (layer.experts if routed else layer.plain)]
        return sum(map(self.nbytes, names if routed else [*names, *self.outside, *self.copied]))

    @property
    def other_bytes(self) -> int:
        """Bytes of everything but routed experts, as it is written where none is kept in FP8."""
        plain = [name for layer in self._layers for name in layer.plain]
        return sum(self.written_bytes(name) for name in [*plain, *self.outside, *self.copied])

    @property
    def copied_bytes(self) -> dict[str, int]:
        """Bytes of each part that is copied, as it is written."""
        sizes: Counter[str] = Counter()
        for name, part in self.copied.items():
            sizes[part] += self.written_bytes(name)
        return dict(sizes)

    def _is_copied_as_it_is(self, name: str) -> bool:
        """Whether a tensor is copied byte for byte: any of a part that is copied, unless it is in FP8."""
        return name in self.copied and self._info(name).dtype not in FP8_DTYPES

    def kept_in_float32(self, name: str) -> bool:
        """Whether a tensor is written as it is stored; any other is written in bf16, as vLLM would cast it."""
        return name.endswith((*(f".{end}" for end in self.family.float32), *RECOMPUTED))

    def written_bytes(self, name: str) -> int:
        """Bytes of a tensor of no routed expert, as `tensors.as_written` and `tensors.copied_tensors` give it."""
        if self._is_copied_as_it_is(name) or (self.kept_in_float32(name) and name not in self._scales):
            return self.nbytes(name)
        return math.prod(self.shape(name)) * 2

    @property
    def positions(self) -> int | None:
        """Longest sequence that the model was made for; None where config.json does not say."""
        positions = self.text.get("max_position_embeddings")
        return positions if isinstance(positions, int) and positions > 0 else None

    @property
    def experts_per_token(self) -> int:
        """Routed experts that the router chooses for a token."""
        return self._size(self.family.top_k)

    def fingerprint(self) -> str:
        """Digest of config.json and of every file's name, size and tensor table; weights are not read."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self._where):
            digest.update(f"{name}|{self.shape(name)}|{self.file_of(name)}".encode())
        for file in sorted(self._headers):
            status = (self.folder / file).stat()
            digest.update(f"{file}|{status.st_size}|{status.st_mtime_ns}".encode())
        return digest.hexdigest()


def on_device(stored: Tensor, device: str) -> Tensor:
    """A tensor of a file on a device.  To a GPU it goes by pinned memory: copies from a file's own pages hold up what
    other threads do on that GPU."""
    if stored.is_cuda or torch.device(device).type != "cuda":
        return stored.to(device)
    return stored.pin_memory().to(device, non_blocking=True)
