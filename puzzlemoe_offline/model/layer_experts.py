"""The routed experts of the layer at hand; on a GPU those of the next are read meanwhile."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import Expert, StackedExperts


class LayerExperts:
    """Hands out routed experts, and keeps those of the layer it was last asked about on the device.

    On a GPU that is a whole layer, read by a thread while the work is still on the layer before.
    """

    def __init__(self, checkpoint: Checkpoint, device: str):
        self.checkpoint, self.device = checkpoint, device
        self.layer = -1
        self.kept: dict[int, Expert] = {}
        self._stacked: StackedExperts | None = None
        self._ahead: tuple[int, Future[StackedExperts]] | None = None
        self._on_gpu = torch.device(device).type == "cuda"
        if self._on_gpu:
            self._reader, self._stream = ThreadPoolExecutor(1), torch.cuda.Stream(device)

    def __call__(self, layer: int, number: int) -> Expert:
        """Expert `number` of a layer, bf16.  Raises CheckpointError as `Checkpoint.expert` does."""
        if self._on_gpu:
            return self.stacked(layer)[number]
        if layer != self.layer:
            self.layer, self.kept = layer, {}
        if number not in self.kept:
            self.kept[number] = self.checkpoint.expert(layer, number, self.device)
        return self.kept[number]

    def stacked(self, layer: int) -> StackedExperts:
        """All experts of a layer on a GPU.  Raises CheckpointError as `Checkpoint.expert` does."""
        if layer != self.layer or self._stacked is None:
            self._stacked = None
            ahead = self._ahead if self._ahead and self._ahead[0] == layer else self._begin(layer)
            self.layer, self._stacked, self._ahead = layer, ahead[1].result(), None
            self.read_ahead(layer + 1)
        return self._stacked

    def read_ahead(self, start: int) -> None:
        """On a GPU starts to read the first layer with experts from `start` on."""
        following = [index for index in self.checkpoint.moe_layers if index >= start]
        if self._on_gpu and following:
            self._ahead = self._begin(following[0])

    def _begin(self, layer: int) -> tuple[int, Future[StackedExperts]]:
        """Starts reading a layer."""
        hidden, intermediate = self.checkpoint.expert_sizes
        shapes = (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)
        with torch.inference_mode():
            stacked = StackedExperts(
                *(
                    torch.empty(self.checkpoint.experts, *shape, dtype=torch.bfloat16, device=self.device)
                    for shape in shapes
                )
            )
        # Kernels that used this memory before may still be at work.
        free = torch.cuda.current_stream(self.device).record_event()
        return layer, self._reader.submit(self._read, layer, stacked, free)

    @torch.inference_mode()
    def _read(self, layer: int, stacked: StackedExperts, free: torch.cuda.Event) -> StackedExperts:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            for number in range(self.checkpoint.experts):
                expert = self.checkpoint.expert(layer, number, self.device)
                for place, matrix in zip(stacked[number].matrices, expert.matrices, strict=True):
                    place.copy_(matrix)
            self._stream.synchronize()
        return stacked
