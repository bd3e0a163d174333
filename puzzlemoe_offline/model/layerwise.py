"""Running a model one decoder layer at a time, so that no more than one layer's weights are ever in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from puzzlemoe_offline.model.checkpoint import RECOMPUTED, Checkpoint
from puzzlemoe_offline.model.deepseek_moe import DeepseekForCausalLM, deepseek_config
from puzzlemoe_offline.model.grouped import Grouping, hidden_of, outputs_of
from puzzlemoe_offline.model.layer_experts import LayerExperts
from puzzlemoe_offline.model.through_gpu import through_gpu
from puzzlemoe_offline.model.weight_files import CheckpointError
from puzzlemoe_vllm.errors import UserError, shown

BATCH_TOKENS = 8192
"""Tokens that go through a layer at once on a CPU."""

ACTIVATION_BYTES = 1 << 32
"""Most bytes of the experts' activations of the tokens that go through a layer at once on a GPU.  Sums over tokens, and
so the bytes that are written, depend on it, but not on how much memory a GPU has."""

HEAD = "lm_head.weight"


class Observer(Protocol):
    """Sees experts at work on one batch."""

    def __call__(self, first: int, counts: list[int], inputs: Tensor, hidden: Tensor, weights: Tensor) -> None:
        """counts: tokens of expert `first` and of those after it, whose rows follow each other in this order; inputs
        [m, H]: the experts' tokens; hidden [m, I]: SiLU(gate) * up, the down projection's input; weights [m]: the
        router's, by which the expert's output for a token is multiplied."""


class StreamedExperts(nn.Module):
    """Stands where a decoder layer's experts module was.

    A CPU reads and runs one expert after another, a GPU all in grouped products.
    """

    def __init__(self, experts: LayerExperts, layer: int):
        super().__init__()
        self.experts, self.layer = experts, layer
        self.observe: Observer | None = None
        self.record: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [M, H], top_k_index int [M, k], top_k_weights [M, k] -> [M, H]."""
        run = self._grouped if hidden_states.is_cuda else self._one_by_one
        out = run(hidden_states, top_k_index, top_k_weights)
        if self.record:
            self.record(hidden_states, top_k_index, top_k_weights, out)
        return out

    def _one_by_one(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            weights = self.experts(self.layer, expert)
            rows, choice = (top_k_index == expert).nonzero(as_tuple=True)
            inputs = hidden_states[rows]
            gate = F.linear(inputs, weights.gate.to(inputs.dtype))
            up = F.linear(inputs, weights.up.to(inputs.dtype))
            hidden = F.silu(gate) * up
            if self.observe:
                self.observe(expert, [len(inputs)], inputs, hidden, top_k_weights[rows, choice])
            down = F.linear(hidden, weights.down.to(inputs.dtype))
            out.index_add_(0, rows, (down * top_k_weights[rows, choice, None]).to(out.dtype))
            del weights  # before the next expert's are read or decoded
        return out

    def _grouped(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        stacked = self.experts.stacked(self.layer)
        grouping = Grouping.of(top_k_index, len(stacked.gate))
        inputs = grouping.rows(hidden_states)
        hidden = hidden_of(stacked, inputs, grouping.ends)
        if self.observe:
            self.observe(0, grouping.counts, inputs, hidden, top_k_weights.flatten()[grouping.slots])
        del inputs
        return grouping.summed(outputs_of(stacked, hidden, grouping.ends), top_k_weights)


def activation_dtype(device: str | torch.device) -> torch.dtype:
    """Of weights and activations: float32 on a CPU (bf16 has no fast path on most) and bf16 on a GPU."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


class _Recorder(nn.Module):
    """Stands where a decoder layer was and keeps the keyword arguments that the model hands to it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.arguments: dict[str, Any] = {}
        for name in ("attention_type", "layer_type"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden_states


class _Stub(nn.Module):
    """Stands where a model without its head was, and hands out hidden states that went through it already."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, **arguments: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self.hidden)


class LayerwiseModel:
    """A transformers model without weights, whose layers are filled from a checkpoint one at a time.

    Making one checks that the checkpoint is whole: by headers alone, but for a head that is on the disk although
    config.json ties it to the embedding.  vLLM does not miss what a quantized checkpoint lacks: it would serve whatever
    its memory held.
    """

    def __init__(self, checkpoint: Checkpoint, device: str):
        """Raises CheckpointError when the checkpoint lacks a tensor of the model, has one more, or one of another shape
        or dtype, or when transformers does not know what config.json says."""
        checkpoint.check_complete()
        self.checkpoint, self.family = checkpoint, checkpoint.family
        self.device = torch.device(device)
        self.dtype = activation_dtype(device)
        try:
            # On the meta device from the start: even for a moment, a layer's experts may be more than there is memory.
            with torch.device("meta"):
                self.model = _build(checkpoint, self.dtype).eval()
            self._check_row()
            rotary = type(getattr(self.model.model, self.family.rotary))(config=self.model.config)
        except UserError:
            raise
        except Exception as error:  # transformers raises whatever its configurations and layers raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise CheckpointError(
                f"{shown(checkpoint.folder / 'config.json', 150)}: transformers makes no model of it "
                f"({shown(reason, 150)}): copy it again, or install a later transformers"
            ) from None
        setattr(self.model.model, self.family.rotary, rotary.to(self.device))
        self._check_tensors()
        if checkpoint.has_weights:
            self._check_tied_head()
        self.arguments: dict[int, list[dict[str, Any]]] = {}

    def batch_size(self, sequence_length: int) -> int:
        """Sequences that go through a layer at once, at least one: `BATCH_TOKENS` tokens on a CPU; on a GPU the largest
        power of two whose experts' activations take no more than `ACTIVATION_BYTES`."""
        if self.device.type == "cpu":
            return max(1, BATCH_TOKENS // sequence_length)
        hidden, intermediate = self.checkpoint.expert_sizes
        token = self.checkpoint.experts_per_token * self.dtype.itemsize * 2 * (hidden + intermediate)
        sequences = max(1, ACTIVATION_BYTES // (token * sequence_length))
        return 1 << (sequences.bit_length() - 1)

    @torch.inference_mode()
    def embed(self, batch: Tensor) -> Tensor:
        """Token ids [B, T] -> hidden states [B, T, H]; also learns every layer's arguments for a batch of this size.

        Raises CheckpointError for a token that the embedding does not have.
        """
        rows = self.model.config.vocab_size
        if int(batch.max()) >= rows:
            raise CheckpointError(
                f"{shown(self.checkpoint.folder, 200)}: its tokenizer gives token {int(batch.max())}, but the "
                f"embedding has {rows} rows: the tokenizer belongs to another model"
            )
        self._load(self.model.model.embed_tokens, "model.embed_tokens")
        layers = self.model.model.layers
        recorders = [_Recorder(layer) for layer in layers]
        norm = self._norm
        self.model.model.layers = nn.ModuleList(recorders)
        setattr(self.model.model, self.family.norm, nn.Identity())
        try:
            hidden: Tensor = self.model.model(input_ids=batch.to(self.device), use_cache=False).last_hidden_state
        finally:
            self.model.model.layers = layers
            setattr(self.model.model, self.family.norm, norm)
        self.arguments[len(batch)] = [recorder.arguments for recorder in recorders]
        return hidden

    def embed_all(self, windows: Tensor, size: int) -> Tensor:
        """Token ids [n, T] -> hidden states [n, T, H] on the CPU, `size` windows at a time.

        Raises CheckpointError as `embed` does.
        """
        shape = *windows.shape, self.model.config.hidden_size
        states = torch.empty(shape, dtype=self.dtype, pin_memory=self.device.type == "cuda")
        for start in range(0, len(windows), size):
            states[start : start + size] = self.embed(windows[start : start + size])
        return states

    @torch.inference_mode()
    def layers(self, experts: LayerExperts, start: int = 0) -> Iterator[tuple[int, DecoderLayer]]:
        """Yields (index, layer) with the layer's weights in place until the next one is asked for."""
        for index in range(start, self.checkpoint.layers):
            module = self.model.model.layers[index]
            streamed = None
            if index in self.checkpoint.moe_layers:
                streamed = StreamedExperts(experts, index)
                getattr(module, self.family.module).experts = streamed
            self._load(module, f"model.layers.{index}")
            arguments = {size: by_layer[index] for size, by_layer in self.arguments.items()}
            yield index, DecoderLayer(module, arguments, streamed)
            module.to("meta")
            if streamed:  # stays in the model, and would keep what its observers gathered
                streamed.observe = streamed.record = None

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [M, H] after the last layer -> float32 logits [M, vocabulary]."""
        self._load(self._norm, f"model.{self.family.norm}")
        self._load(self.model.lm_head, "model.embed_tokens" if self._tied else "lm_head")
        # By the model's own forward: some scale their logits.
        whole, self.model.model = self.model.model, _Stub(self._norm(hidden)[None])
        try:
            logits: Tensor = self.model(use_cache=False).logits[0].float()
        finally:
            self.model.model = whole
        return logits

    @property
    def _norm(self) -> nn.Module:
        """The norm after the last layer."""
        norm: nn.Module = getattr(self.model.model, self.family.norm)
        return norm

    @property
    def _tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.model.config.tie_word_embeddings)

    def _check_tied_head(self) -> None:
        """Releases of vLLM and transformers differ in whether they serve such a head or the embedding."""
        if not self._tied or HEAD not in self.checkpoint.outside:
            return
        embedding = self._on_disk("model.embed_tokens.weight")
        if not torch.equal(self.checkpoint.tensor(HEAD), self.checkpoint.tensor(embedding)):
            raise CheckpointError(
                f"{shown(self.checkpoint.folder, 200)}: config.json ties the head to the embedding, but {HEAD} is "
                "another: set tie_word_embeddings to false, or drop that tensor, whichever the model was made with"
            )

    def _check_row(self) -> None:
        """The family's row names what transformers' class has, and all of a router's tensors.

        Raises CheckpointError: a router's tensor that the row does not name would not follow its experts.
        """
        base = self.model.model
        self._require_module(base, self.family.norm)
        self._require_module(base, self.family.rotary)
        layer = base.layers[self.checkpoint.moe_layers[0]]
        self._require_module(layer, self.family.module)
        block = getattr(layer, self.family.module)
        if not hasattr(block, "experts"):
            return  # `_check_tensors` says that the layer has none in config.json
        if self.family.shared:
            self._require_module(block, self.family.shared)
        apart = ("experts.", *([self.family.shared] if self.family.shared else []))
        held = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items() if not name.startswith(apart)}
        experts = self.checkpoint.experts
        per_expert = {name for name, shape in held.items() if shape[:1] == (experts,) or shape == (1, experts)}
        if strange := sorted(per_expert ^ set(self.family.router.values())):
            raise self._row_error(f"{self.family.module}.{strange[0]}")

    def _require_module(self, parent: nn.Module, name: str) -> None:
        if not hasattr(parent, name):
            raise self._row_error(name)

    def _row_error(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{type(self.model).__name__} of this release of transformers and puzzlemoe's table of families differ in "
            f"{shown(name, 80)}: install another release of transformers, or the latest puzzlemoe-vllm"
        )

    def _check_tensors(self) -> None:
        """Every tensor outside routed experts is there; `Checkpoint.check_complete` checks those."""
        for index, layer in enumerate(self.model.model.layers):
            has_experts = hasattr(getattr(layer, self.family.module), "experts")
            if has_experts != (index in self.checkpoint.moe_layers):
                raise CheckpointError(
                    f"{shown(self.checkpoint.folder, 200)}: layer {index} has "
                    + (
                        "no expert tensors, but config.json says that it has experts: the download or the copy is "
                        "incomplete"
                        if has_experts
                        else "expert tensors, but config.json says that it has none: config.json belongs to another "
                        "model"
                    )
                )
        expected = {name for index in self.checkpoint.moe_layers for name in self.checkpoint.layer(index).experts}
        experts = f".{self.family.module}.experts."
        for name, parameter in self.model.state_dict().items():
            if experts in name or (name == HEAD and self._tied and HEAD not in self.checkpoint.outside):
                continue
            expected.add(on_disk := self._on_disk(name))
            self.checkpoint.check_tensor(on_disk, tuple(parameter.shape))
        expected |= self.checkpoint.copied.keys()
        for name in self.checkpoint.names:
            if name not in expected and not name.endswith(RECOMPUTED):
                raise CheckpointError(
                    f"{shown(self.checkpoint.folder / self.checkpoint.file_of(name), 200)}: {shown(name)} is none of "
                    f"the tensors of a {self.checkpoint.config['model_type']} of {self.checkpoint.layers} layers: the "
                    "file or config.json belongs to another model"
                )

    def _load(self, module: nn.Module, prefix: str) -> None:
        """Fills a module's parameters and buffers that have no values yet from the tensors below `prefix`."""
        for name, held in list(module.state_dict(keep_vars=True).items()):
            if held.device.type == "meta":
                on_disk = self._on_disk(f"{prefix}.{name}")
                value = self.checkpoint.plain_tensor(on_disk)
                # What transformers computes in float32 whatever the model's dtype, e.g. a router's bias, or vLLM does.
                dtype = torch.float32 if self.checkpoint.kept_in_float32(on_disk) else held.dtype
                # Emptying the GPU's cache after every tensor, the default, would have its memory asked for anew.
                set_module_tensor_to_device(module, name, self.device, value=value, dtype=dtype, clear_cache=False)
        empty = [name for name, buffer in module.named_buffers() if buffer.device.type == "meta" != self.device.type]
        if empty:
            raise self._row_error(f"{prefix}.{empty[0]}")

    def _on_disk(self, name: str) -> str:
        """Name on disk of a parameter or buffer of transformers' class."""
        match = re.match(r"model\.(?:layers\.(\d+)\.)?", name)
        if match is None:
            return name
        rest = name.removeprefix(match[0])
        block = self.checkpoint.layer(int(match[1])).block if match[1] else None
        if block and rest.startswith(f"{self.family.module}."):
            below = rest.removeprefix(f"{self.family.module}.")
            on_disk = {there: here for here, there in self.family.router.items()}
            return f"{block}.{on_disk.get(below, below)}"
        return self.family.prefix + name.removeprefix("model.")


class DecoderLayer:
    """One decoder layer with its weights in place; `experts` is None in a layer without routed experts.

    arguments: by batch size, for the sizes that `LayerwiseModel.embed` has seen.
    """

    def __init__(self, module: nn.Module, arguments: dict[int, dict[str, Any]], experts: StreamedExperts | None):
        self.module, self.arguments, self.experts = module, arguments, experts

    @torch.inference_mode()
    def __call__(self, hidden: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        out = self.module(hidden, **self.arguments[len(hidden)])
        after: Tensor = out[0] if isinstance(out, tuple) else out
        return after

    def advance(self, states: Tensor, out: Tensor, size: int, device: torch.device | str) -> None:
        """Moves hidden states [n, T, H] on the CPU through the layer, `size` windows at a time; `out`, where they go,
        may be the same memory."""
        before, after = states.split(size), out.split(size)
        if torch.device(device).type == "cuda":
            through_gpu(self, before, after, device)
            return
        for its, place in zip(before, after, strict=True):
            place.copy_(self(its))


def _build(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """In `dtype` from the start, as transformers loads a model: casting it later would round its rotary frequencies."""
    config = {key: value for key, value in checkpoint.text.items() if key != "quantization_config"}
    if config["model_type"] == "deepseek":
        return DeepseekForCausalLM._from_config(deepseek_config(config), dtype=dtype)
    native = checkpoint.family.native or config["model_type"]
    found = CONFIG_MAPPING[native].from_dict({**config, "model_type": native})
    return AutoModelForCausalLM.from_config(found, dtype=dtype, attn_implementation="sdpa")
