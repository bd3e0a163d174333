"""Work that is shared by all GPUs that are visible, a thread for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def sharing(device: torch.device | str) -> list[torch.device]:
    """The devices that share the work of a run on `device`: every GPU, or the CPU alone.

    What a run writes does not depend on how many they are: they share parts of the work that one would do one after
    another, and sums are added up in the order of the parts.
    """
    if torch.device(device).type == "cpu":
        return [torch.device(device)]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def on_each(devices: Sequence[torch.device], work: Callable[[int, torch.device], Result]) -> list[Result]:
    """What `work` makes of each device and its place among them; on several devices at once.  Raises what it raises."""
    if len(devices) == 1:
        return [work(0, devices[0])]

    def current(place: int) -> Result:
        with torch.cuda.device(devices[place]):
            return work(place, devices[place])

    with ThreadPoolExecutor(len(devices)) as pool:
        return list(pool.map(current, range(len(devices))))
