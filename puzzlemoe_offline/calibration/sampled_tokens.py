"""A few calibration tokens, kept to measure what merging a layer does to its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from puzzlemoe_offline.model.expert import Expert, StackedExperts
from puzzlemoe_offline.model.grouped import Grouping, hidden_of, outputs_of
from puzzlemoe_offline.relative_error import relative_error

TOKENS = 2048
"""Tokens that are kept of a layer."""


@dataclass(frozen=True)
class OutputErrors:
    """||y - y'|| / ||y|| on the kept tokens.

    layer: y the routed experts' output.  experts: y one expert's output, before the router's weights, for the tokens
    that chose it; None where none did.  tokens: how many did.  A float is None where there is no such number.
    """

    layer: float | None
    experts: list[float | None]
    tokens: list[int]


@dataclass
class SampledTokens:
    """MoE inputs and outputs of the first tokens of a layer."""

    batches: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def record(self, hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        """Keeps hidden [M, H], ids [M, k], weights [M, k] and out [M, H] up to `TOKENS` tokens."""
        if room := TOKENS - sum(len(batch[0]) for batch in self.batches):
            self.batches.append((hidden[:room].clone(), ids[:room].clone(), weights[:room].clone(), out[:room].clone()))

    def output_errors(
        self, count: int, source: Callable[[int], Expert], merged: Callable[[int], Expert]
    ) -> OutputErrors:
        """What the layer's output and that of each of its `count` experts loses when `merged` stands for `source`,
        both by the source's ids."""
        on_gpu = bool(self.batches) and self.batches[0][0].is_cuda
        sums = (self._grouped_sums if on_gpu else self._sums)(count, source, merged)
        error, energy, tokens = sums.tolist()
        relative = [relative_error(*both) for both in zip(error, energy, strict=True)]
        chosen = [round(tokens_) for tokens_ in tokens[:count]]
        own = [one if seen else None for one, seen in zip(relative[:count], chosen, strict=True)]
        return OutputErrors(relative[count], own, chosen)

    def _sums(self, count: int, source: Callable[[int], Expert], merged: Callable[[int], Expert]) -> Tensor:
        """Squared error, energy and tokens of every expert, and in the last column of the layer; float64
        [3, count + 1]."""
        device = self.batches[0][0].device if self.batches else None
        sums = torch.zeros(3, count + 1, dtype=torch.float64, device=device)
        for hidden, ids, weights, out in self.batches:
            total = torch.zeros_like(hidden)
            for number in ids.unique().tolist():
                rows, choice = (ids == number).nonzero(as_tuple=True)
                inputs = hidden[rows]
                new, exact = merged(number).output(inputs), source(number).output(inputs)
                total.index_add_(0, rows, (new * weights[rows, choice, None]).to(total.dtype))
                sums[0, number] += _square(new.double() - exact.double())
                sums[1, number] += _square(exact.double())
                sums[2, number] += len(rows)
            sums[0, count] += _square(total.double() - out.double())
            sums[1, count] += _square(out.double())
        return sums

    def _grouped_sums(self, count: int, source: Callable[[int], Expert], merged: Callable[[int], Expert]) -> Tensor:
        """The same of all experts at once."""
        sums = torch.zeros(3, count + 1, dtype=torch.float64, device=self.batches[0][0].device)
        stacks = [StackedExperts.of([expert(number) for number in range(count)]) for expert in (merged, source)]
        for hidden, ids, weights, out in self.batches:
            grouping = Grouping.of(ids, count)
            inputs, counts = grouping.rows(hidden), grouping.counts
            new, exact = (outputs_of(each, hidden_of(each, inputs, grouping.ends), grouping.ends) for each in stacks)
            total = grouping.summed(new, weights)
            for row, values in enumerate((new.double() - exact.double(), exact.double())):
                by_slot = values.square().sum(dim=1)
                sums[row, :count] += torch.stack([its.sum() for its in by_slot.split(counts)])
            sums[2, :count] += torch.tensor(counts, device=sums.device)
            sums[0, count] += _square(total.double() - out.double())
            sums[1, count] += _square(out.double())
        return sums


def _square(values: Tensor) -> Tensor:
    return values.square().sum()
