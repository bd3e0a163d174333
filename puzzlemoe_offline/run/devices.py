"""The GPUs of a run: the first takes the calibration tokens from layer to layer, the others merge the layers that it is
done with.

Calibration does not depend on merged weights: hidden states of the dense model go on to the next layer.  So every layer
is calibrated on the first GPU and merged on one of the same kind, from the same numbers by the same kernels: what is
written has the bytes of a run with one GPU.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from puzzlemoe_offline.methods.base import LayerRecord, NewLayer
from puzzlemoe_offline.model.layer_experts import SourceLayer
from puzzlemoe_offline.run.output import to_host

WAITING = 1
"""Layers that wait on the first GPU for another one: enough to keep the others busy, and no more, since one may take
10 GB (Mixtral-8x7B: 2.8 of experts, 7.1 of their inputs' moments)."""

Merge = Callable[[SourceLayer, Any], NewLayer]
"""`LayerMethod.merge`."""


def other_gpus(device: torch.device) -> list[str]:
    """The GPUs beside `device` that torch sees and that are of its kind: another kind would round otherwise."""
    if device.type != "cuda":
        return []
    first = torch.cuda.current_device() if device.index is None else device.index
    kind = torch.cuda.get_device_name(first)
    every = range(torch.cuda.device_count())
    return [f"cuda:{index}" for index in every if index != first and torch.cuda.get_device_name(index) == kind]


def most_begun(others: int) -> int:
    """Layers that may have been begun and not be written: with the other GPUs, waiting for them, or merged before the
    one that comes first, by the first GPU."""
    return others + WAITING + 1 if others else 0


@dataclass
class ObservedLayer:
    """A layer that is to be merged.

    source, seen: what `LayerMethod.merge` takes, until one does; source is None without routed experts.
    states: the calibration tokens' hidden states after the layer, if any.  seconds: by stage of what was done so far.
    """

    index: int
    source: SourceLayer | None
    seen: Any
    states: Tensor | None
    seconds: dict[str, float]
    _ready: torch.cuda.Event | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.source and self.source.stacked:
            self._ready = torch.cuda.current_stream(self.source.stacked.gate.device).record_event()

    def merged(self, merge: Merge, device: str | None = None) -> NewLayer:
        """The new layer; on another device, if one is named, whose own is then current."""
        if self.source is None:
            return NewLayer({}, LayerRecord(layer=self.index))
        source, seen = self.source, self.seen
        self.source = self.seen = None  # not to be held while the layer is merged
        if device:
            source, seen = self._moved(source, seen, device)
        began = time.perf_counter()
        new = merge(source, seen)
        new.record.seconds["merge"] = time.perf_counter() - began - sum(new.record.seconds.values())
        return new

    def _moved(self, source: SourceLayer, seen: Any, device: str) -> tuple[SourceLayer, Any]:
        """Both on another device, beside whatever the first one has to do meanwhile."""
        if source.stacked and self._ready:
            stream = torch.cuda.Stream(source.stacked.gate.device)
            stream.wait_event(self._ready)
            with torch.cuda.stream(stream):
                source, seen = moved(source, device), moved(seen, device)
                stream.synchronize()
        return dataclasses.replace(source, device=device), seen


def moved(value: Any, device: str) -> Any:
    """The same with a GPU's tensors on another one, in whatever dataclasses, lists, tuples and dicts they are; those on
    the CPU and all else stay."""
    match value:
        case Tensor():
            return value.to(device) if value.is_cuda else value
        case list() | tuple():
            return type(value)(moved(each, device) for each in value)
        case dict():
            return {key: moved(each, device) for key, each in value.items()}
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.fields(value)
            return dataclasses.replace(value, **{its.name: moved(getattr(value, its.name), device) for its in fields})
    return value


def in_order(
    layers: Iterator[ObservedLayer], merge: Merge, others: list[str]
) -> Generator[tuple[NewLayer, Tensor | None], None, None]:
    """What `merge` makes of every layer, with its states, in the order in which they come.

    The caller's GPU merges a layer itself where there is no other, or where all are busy and no more may wait.
    An error of a layer is raised in its turn, after those before it were handed out.  Whoever stops listening, for an
    error or a signal, waits for the layers that are being merged, which takes no longer than one does; those that wait
    are given up.
    """
    begun: deque[tuple[ObservedLayer, Future[NewLayer]]] = deque()
    failed: Exception | None = None
    with _Others(merge, others) as workers:
        while failed is None:
            try:
                layer = next(layers, None)
            except Exception as error:
                failed = error
                continue
            if layer is None:
                break
            busy = sum(not new.done() for _, new in begun)
            there = others and layer.source and busy < len(others) + WAITING
            begun.append((layer, workers.submit(layer) if there else _here(merge, layer)))
            del layer
            while begun and (begun[0][1].done() or len(begun) > most_begun(len(others))):
                yield _finished(*begun.popleft(), bool(others))
        for place, (layer, new) in enumerate(begun):
            if new.cancel():  # it still waits, and the first GPU has nothing else to do
                begun[place] = layer, _here(merge, layer)
        while begun:
            yield _finished(*begun.popleft(), bool(others))
    if failed:
        raise failed


def _here(merge: Merge, layer: ObservedLayer) -> Future[NewLayer]:
    new: Future[NewLayer] = Future()
    try:
        new.set_result(layer.merged(merge))
    except Exception as error:
        new.set_exception(error)
    return new


def _finished(layer: ObservedLayer, new: Future[NewLayer], several: bool) -> tuple[NewLayer, Tensor | None]:
    began = time.perf_counter()
    made = new.result()
    waited = {"wait": time.perf_counter() - began} if several else {}
    made.record.seconds = layer.seconds | made.record.seconds | waited
    return made, layer.states


class _Others:
    """A thread for each of the other GPUs.  Leaving waits for the layers that they are at: an exception that was thrown
    into a thread might leave a lock of torch or Triton behind."""

    def __init__(self, merge: Merge, devices: list[str]):
        self._merge = merge
        self._free: SimpleQueue[str] = SimpleQueue()
        for device in devices:
            self._free.put(device)
        self._pool = ThreadPoolExecutor(max(1, len(devices)))
        if devices:  # torch loads its linear algebra on first use, which must not be in two threads at once
            torch.linalg.cholesky_ex(torch.eye(1, device=devices[0]))

    def __enter__(self) -> _Others:
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, layer: ObservedLayer) -> Future[NewLayer]:
        """The layer merged on the next GPU that is free, its tensors on the host."""
        return self._pool.submit(self._work, layer)

    def _work(self, layer: ObservedLayer) -> NewLayer:
        device = self._free.get()
        try:
            with _current(device):
                new = layer.merged(self._merge, device)
                return NewLayer(to_host(new.tensors), new.record)
        finally:
            self._free.put(device)


def _current(device: str) -> AbstractContextManager[Any]:
    """On a GPU, that kernels and libraries which take the current one take this."""
    return torch.cuda.device(device) if torch.device(device).type == "cuda" else nullcontext()
