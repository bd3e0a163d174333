"""The routed experts of the layer at hand; on a GPU those of the next are read meanwhile."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import Expert, StackedExperts


@dataclass(frozen=True)
class SourceLayer:
    """One layer's routed experts as the source has them, bf16, which stay on the device until the layer is done.

    stacked: all of them, on a GPU.  kept: on a CPU those that were asked for.
    """

    checkpoint: Checkpoint
    index: int
    device: str
    stacked: StackedExperts | None = None
    kept: dict[int, Expert] = field(default_factory=dict)

    def expert(self, number: int) -> Expert:
        """One of them.  Raises CheckpointError as `Checkpoint.expert` does."""
        if self.stacked:
            return self.stacked[number]
        if number not in self.kept:
            self.kept[number] = self.checkpoint.expert(self.index, number, self.device)
        return self.kept[number]

    @property
    def experts(self) -> list[Expert]:
        """All of them."""
        return [self.expert(number) for number in range(self.checkpoint.experts)]


class LayerExperts:
    """Hands out layers, and holds the one that it was last asked about.

    On a GPU a thread reads the next layer while the work is still on the one before.
    """

    def __init__(self, checkpoint: Checkpoint, device: str):
        self.checkpoint, self.device = checkpoint, device
        self._held: SourceLayer | None = None
        self._ahead: tuple[int, Future[StackedExperts]] | None = None
        self._on_gpu = torch.device(device).type == "cuda"
        if self._on_gpu:
            self._reader, self._stream = ThreadPoolExecutor(1), torch.cuda.Stream(device)

    def __call__(self, layer: int, number: int) -> Expert:
        """Expert `number` of a layer.  Raises CheckpointError as `Checkpoint.expert` does."""
        return self.of(layer).expert(number)

    def stacked(self, layer: int) -> StackedExperts:
        """All experts of a layer on a GPU.  Raises CheckpointError as `Checkpoint.expert` does."""
        stacked = self.of(layer).stacked
        assert stacked
        return stacked

    def of(self, layer: int) -> SourceLayer:
        """A layer with experts.  On a GPU it is read whole; raises CheckpointError as `Checkpoint.expert` does."""
        if self._held is None or layer != self._held.index:
            self._held = None
            self._held = SourceLayer(self.checkpoint, layer, self.device, self._read(layer) if self._on_gpu else None)
        return self._held

    def _read(self, layer: int) -> StackedExperts:
        ahead = self._ahead if self._ahead and self._ahead[0] == layer else self._begin(layer)
        stacked, self._ahead = ahead[1].result(), None
        self.read_ahead(layer + 1)
        return stacked

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
        return layer, self._reader.submit(self._fill, layer, stacked, free)

    @torch.inference_mode()
    def _fill(self, layer: int, stacked: StackedExperts, free: torch.cuda.Event) -> StackedExperts:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            for number in range(self.checkpoint.experts):
                expert = self.checkpoint.expert(layer, number, self.device)
                for place, matrix in zip(stacked[number].matrices, expert.matrices, strict=True):
                    place.copy_(matrix)
            self._stream.synchronize()
        return stacked
