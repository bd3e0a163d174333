"""Calibration tokens on their way through a layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from puzzlemoe_offline.model.layerwise import DecoderLayer, Observer

Recorder = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Gets a batch's hidden states [M, H], the router's ids and weights [M, k], and the routed experts' output [M, H]."""


class LayerPasses:
    """Runs the calibration tokens through one layer a given number of times.

    states: their hidden states before it, [samples, T, H] on the CPU; after: where the last time puts those after it,
    which may be the same memory.
    """

    def __init__(self, layer: DecoderLayer, states: Tensor, after: Tensor, windows: int, device: str, count: int):
        """windows: how many go through the layer at once."""
        self._layer, self._states, self._after = layer, states, after
        self._windows, self._device = windows, device
        self.left = count

    def run(
        self,
        observe: Observer | None = None,
        record: Recorder | None = None,
    ) -> None:
        """One pass.  observe sees every expert at work on every batch, record the layer's routed experts as a whole."""
        assert self.left > 0, "more passes than the method said it needs"
        self.left -= 1
        if self._layer.experts:
            self._layer.experts.observe, self._layer.experts.record = observe, record
        if self.left:
            for batch in self._states.split(self._windows):
                self._layer(batch.to(self._device))
        else:
            self._layer.advance(self._states, self._after, self._windows, self._device)
