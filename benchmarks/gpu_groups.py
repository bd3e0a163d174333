"""Pieces of work side by side on the GPUs of one machine, each with so many of them to itself."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch

Result = TypeVar("Result")


class Work(NamedTuple, Generic[Result]):
    """What is to be run with the names of so many GPUs."""

    gpus: int
    run: Callable[[list[str]], Result]


def visible_gpus() -> list[str]:
    """The GPUs that CUDA is to see, as CUDA_VISIBLE_DEVICES names them.  Makes no CUDA context."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(index) for index in range(count)]


def side_by_side(work: Sequence[Work[Result]], gpus: list[str]) -> Iterator[tuple[int, Result]]:
    """Position and result of each piece of work as it ends.

    Work begins in its order, so that it waits when there are GPUs for a later piece but not yet for it.  Raises
    ValueError, before any begins, when one needs more GPUs than there are; what a piece raises, once the others that
    have begun are at their end.
    """
    if (most := max(piece.gpus for piece in work)) > len(gpus):
        raise ValueError(f"{most} GPUs are needed, and CUDA sees {len(gpus)}")
    waiting, free = deque(enumerate(work)), list(gpus)
    running: dict[Future[Result], tuple[int, list[str]]] = {}
    with ThreadPoolExecutor(len(gpus)) as pool:
        while waiting or running:
            while waiting and waiting[0][1].gpus <= len(free):
                position, piece = waiting.popleft()
                taken, free = free[: piece.gpus], free[piece.gpus :]
                running[pool.submit(piece.run, taken)] = position, taken
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                position, taken = running.pop(ended)
                free = [gpu for gpu in gpus if gpu in free or gpu in taken]
                yield position, ended.result()


def environment_of(gpus: list[str]) -> dict[str, str]:
    """This process's environment, for one that has these GPUs alone.

    vLLM asks the system for a free port where its ranks meet.  With VLLM_PORT it counts up from there, and two engines
    that start at once would find the same one.
    """
    kept = {name: value for name, value in os.environ.items() if name != "VLLM_PORT"}
    return kept | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}


def lacking_room(folder: Path, gpus: int) -> str | None:
    """Says so when a model's files do not fit into the memory of so many GPUs."""
    needed = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    there = gpus * torch.cuda.get_device_properties(0).total_memory
    if needed <= there:
        return None
    return f"{needed / 1e9:.0f} GB of weights do not fit into {there / 1e9:.0f} GB of GPU memory"
