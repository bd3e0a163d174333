"""What a run is: a model, a method, and what must hold before work begins."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel
from rich.filesize import decimal

from puzzlemoe_offline.calibration.text import Calibration
from puzzlemoe_offline.methods.base import LayerMethod
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.fp8_layers import fp8_bytes
from puzzlemoe_offline.model.layerwise import LayerwiseModel, activation_dtype
from puzzlemoe_offline.model.tensors import written_name
from puzzlemoe_offline.version import VERSION


class Sizes(BaseModel):
    """Bytes of routed experts and of everything else, before as the source stores them.

    experts_after: as the method stores them; of one whose results are written in bf16, what its own storage would take.
    other: as it is written.  copied: of these, parts that are copied, e.g. layers for multi-token prediction, by name.
    """

    experts_before: int
    experts_after: int
    other_before: int
    other: int
    copied: dict[str, int] = {}

    @property
    def experts_text(self) -> str:
        """What becomes of routed experts, for a reader."""
        return f"{decimal(self.experts_before)} -> {decimal(self.experts_after)}"

    @property
    def other_text(self) -> str:
        """What becomes of everything else."""
        same = self.other == self.other_before
        return f"{decimal(self.other)}, unchanged" if same else f"{decimal(self.other_before)} -> {decimal(self.other)}"


@dataclass(frozen=True)
class Job:
    """One run of a method over a model.

    source: what to call the model where it is written down; revision: of a hub model.
    tokens: of calibration text that will go through the model; 0 for a method that needs none.
    fp8: names of the source's weights outside routed experts that are written in FP8, of a method that packs.
    """

    model: LayerwiseModel
    method: LayerMethod
    source: str
    revision: str | None = None
    tokens: int = 0
    fp8: frozenset[str] = frozenset()

    @property
    def checkpoint(self) -> Checkpoint:
        """The model as it lies on the disk."""
        return self.model.checkpoint

    @property
    def device(self) -> str:
        """Where layers run and are merged."""
        return str(self.model.device)

    @property
    def on_gpu(self) -> bool:
        """Whether that is a GPU, which need not wait for the disk."""
        return self.model.device.type == "cuda"

    @property
    def shards(self) -> int:
        """Files that are written: one a layer, one for what is outside layers, and one for what is copied, if any."""
        return self.checkpoint.layers + 1 + bool(self.checkpoint.copied)

    @property
    def experts_after(self) -> int:
        """Bytes of routed experts in the method's own storage, before any is seen: more if some suit no partner."""
        return round(self.checkpoint.routed_bytes * self.method.bits_per_weight(self.checkpoint) / 16)

    @property
    def sizes(self) -> Sizes:
        """From the headers: more, if some experts suit no partner."""
        return Sizes(
            experts_before=self.checkpoint.stored_bytes(routed=True),
            experts_after=self.experts_after,
            other_before=self.checkpoint.stored_bytes(routed=False),
            other=self.other_after,
            copied=self.checkpoint.copied_bytes,
        )

    @property
    def other_after(self) -> int:
        """Bytes of everything but routed experts as it is written."""
        saved = (self.checkpoint.written_bytes(name) - fp8_bytes(self.checkpoint.shape(name)) for name in self.fp8)
        return self.checkpoint.other_bytes - sum(saved)

    @property
    def fp8_layers(self) -> list[str]:
        """Names of the layers that `fp8` are the weights of, where they are written."""
        layers = range(self.checkpoint.layers)
        named = [(layer, name) for layer in layers for name in self.checkpoint.layer(layer).plain if name in self.fp8]
        return [written_name(self.checkpoint, layer, name).removesuffix(".weight") for layer, name in named]

    @property
    def choices(self) -> dict[str, Any]:
        """What was chosen, and what it comes to for this model, as JSON data."""
        return self.method.choices(self.checkpoint) | ({"dense": "fp8"} if self.fp8 else {})

    @property
    def states_bytes(self) -> int:
        """Of the calibration tokens' hidden states."""
        return self.tokens * self.checkpoint.expert_sizes[0] * activation_dtype(self.device).itemsize

    @property
    def disk_bytes(self) -> int:
        """The written model and, while the run lasts, the hidden states after two layers; from the headers."""
        left = self.method.experts_left(self.checkpoint)
        dense = self.checkpoint.routed_bytes * left // self.checkpoint.experts
        written = self.experts_after if self.method.packs else dense
        return written + self.other_after + 2 * self.states_bytes

    def fingerprint(self, calibration: Calibration | None) -> str:
        """Digest of everything that the output depends on."""
        parts = (
            self.checkpoint.fingerprint(),
            repr(self.method),
            *sorted(self.fp8),
            calibration.digest if calibration else "",
            VERSION,
            torch.device(self.device).type,
        )
        return hashlib.sha256("|".join(parts).encode()).hexdigest()
