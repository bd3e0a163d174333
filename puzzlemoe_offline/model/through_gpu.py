"""Batches in the host's memory on their way through a GPU: one is fetched and one brought back while another is at
work."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def through_gpu(
    work: Callable[[Tensor], Tensor], before: Sequence[Tensor], after: Sequence[Tensor], device: torch.device | str
) -> None:
    """Puts into each batch of `after` what `work` makes of that of `before` on the device's current stream.

    In pinned memory, or nothing goes on meanwhile.  A batch of `after` may be the same memory as its own of `before`.
    """
    working = torch.cuda.current_stream(device)
    fetching, returning = _streams(torch.device(device))

    def fetched(number: int) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(fetching):
            return before[number].to(device, non_blocking=True), fetching.record_event()

    ahead = fetched(0)
    for number, out in enumerate(after):
        inputs, there = ahead
        if number + 1 < len(before):
            ahead = fetched(number + 1)
        working.wait_event(there)
        # Each tensor is used on a stream that its memory is not of, and which it must not be taken from meanwhile.
        inputs.record_stream(working)
        result = work(inputs)
        result.record_stream(returning)
        returning.wait_stream(working)
        with torch.cuda.stream(returning):
            out.copy_(result, non_blocking=True)
    returning.synchronize()


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """For copies to a device and from it; the same every time, since torch keeps freed memory for the stream that it
    was of."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)
