"""What a run is: a model, a method, and what must hold before work begins."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from puzzlemoe_offline.calibration.text import Calibration
from puzzlemoe_offline.methods.base import LayerMethod
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.layerwise import LayerwiseModel, activation_dtype
from puzzlemoe_offline.version import VERSION


@dataclass(frozen=True)
class Job:
    """One run of a method over a model.

    source: what to call the model where it is written down; revision: of a hub model.
    tokens: of calibration text that will go through the model; 0 for a method that needs none.
    """

    model: LayerwiseModel
    method: LayerMethod
    source: str
    revision: str | None = None
    tokens: int = 0

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
        """Files that are written: one a layer, and one for what is outside layers."""
        return self.checkpoint.layers + 1

    @property
    def experts_after(self) -> int:
        """Bytes of routed experts in the method's own storage, before any is seen: more if some suit no partner."""
        return round(self.checkpoint.routed_bytes * self.method.bits_per_weight(self.checkpoint) / 16)

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
        return written + self.checkpoint.other_bytes + 2 * self.states_bytes

    def fingerprint(self, calibration: Calibration | None) -> str:
        """Digest of everything that the output depends on."""
        parts = (
            self.checkpoint.fingerprint(),
            repr(self.method),
            calibration.digest if calibration else "",
            VERSION,
            torch.device(self.device).type,
        )
        return hashlib.sha256("|".join(parts).encode()).hexdigest()
