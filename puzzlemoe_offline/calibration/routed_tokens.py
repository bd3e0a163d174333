"""All calibration tokens of a layer as its router sent them to experts, kept until the layer is merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from puzzlemoe_offline.model.grouped import Grouping

AT_ONCE = 16384
"""Tokens of an expert that are handed out at once: bounds the memory for what it makes of them, and keeps a GPU
busy."""


@dataclass(frozen=True)
class _Batch:
    """hidden: MoE inputs [M, H]; weights: the router's, of slots [M * k], which come expert by expert; tokens:
    int64 [M * k], whose slots they are; counts: slots of each expert."""

    hidden: Tensor
    weights: Tensor
    tokens: Tensor
    counts: list[int]


@dataclass
class RoutedTokens:
    """Of a layer with so many experts."""

    experts: int
    batches: list[_Batch] = field(default_factory=list)

    def record(self, hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        """Keeps hidden [M, H], ids [M, k] and weights [M, k] of a batch; out is not needed."""
        grouping = Grouping.of(ids, self.experts)
        slots = grouping.slots
        self.batches.append(
            _Batch(hidden.clone(), weights.flatten()[slots], slots // grouping.choices, grouping.counts)
        )

    def of(self, expert: int) -> Iterator[tuple[Tensor, Tensor]]:
        """An expert's inputs [m, H] and the router's weights [m] for what it makes of them, `AT_ONCE` at a time."""
        parts: list[tuple[Tensor, Tensor]] = []
        for batch in self.batches:
            begin = sum(batch.counts[:expert])
            its = slice(begin, begin + batch.counts[expert])
            parts.append((batch.hidden[batch.tokens[its]], batch.weights[its]))
            last, count = batch is self.batches[-1], sum(len(inputs) for inputs, _ in parts)
            if count >= AT_ONCE or (last and count):
                inputs, weights = (torch.cat(each) for each in zip(*parts, strict=True))
                now = count if last else count - count % AT_ONCE
                yield from zip(inputs[:now].split(AT_ONCE), weights[:now].split(AT_ONCE), strict=True)
                parts = [(inputs[now:], weights[now:])]
