"""Calibration tokens on their way through a layer."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from puzzlemoe_offline.model.devices import on_each, sharing
from puzzlemoe_offline.model.layerwise import DecoderLayer, Observer

Recorder = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Gets a batch's hidden states [M, H], the router's ids and weights [M, k], and the routed experts' output [M, H]."""


class LayerPasses:
    """Runs the calibration tokens through one layer a given number of times.

    states: their hidden states before it, [samples, T, H] on the CPU; after: where the last time puts those after it,
    which may be the same memory.  All GPUs share the batches.

    seconds: what all passes took so far.
    """

    def __init__(self, layer: DecoderLayer, states: Tensor, after: Tensor, windows: int, device: str, count: int):
        """windows: how many go through the layer at once."""
        self._states, self._after = states, after
        self._windows, self._devices = windows, sharing(device)
        self._layers = {each: layer if len(self._devices) == 1 else layer.on(each) for each in self._devices}
        self.left = count
        self.seconds = 0.0

    def run(
        self,
        observe: Observer | None = None,
        record: Recorder | None = None,
    ) -> None:
        """One pass.  observe sees every expert at work on every batch, record the layer's routed experts as a whole."""
        assert self.left > 0, "more passes than the method said it needs"
        began = time.perf_counter()
        self.left -= 1
        batches = list(zip(self._states.split(self._windows), self._after.split(self._windows), strict=True))
        for start in range(0, len(batches), len(self._devices)):
            some = batches[start : start + len(self._devices)]
            rounds = on_each(
                self._devices[: len(some)],
                lambda place, device, some=some: self._pass(*some[place], device, observe, record),
            )
            for calls in rounds:
                for call in calls:
                    call()
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        self.seconds += time.perf_counter() - began

    def _pass(
        self, states: Tensor, after: Tensor, device: torch.device, observe: Observer | None, record: Recorder | None
    ) -> list[Callable[[], None]]:
        """One batch; with several devices, who sees the experts is called only by what this returns, so that batches
        are seen in their order."""
        layer, calls = self._layers[device], list[Callable[[], None]]()
        if layer.experts:
            layer.experts.observe, layer.experts.record = observe, record
        if layer.experts and len(self._devices) > 1:
            first = self._devices[0]
            if observe:
                layer.experts.observe = lambda *seen: calls.append(lambda: observe(*seen))
            if record:
                layer.experts.record = lambda *seen: calls.append(
                    lambda: record(*(tensor.to(first) for tensor in seen))
                )
        moved = layer(states.to(device, non_blocking=True))
        if not self.left:
            after.copy_(moved, non_blocking=True)
        return calls
