"""Which experts of a layer merge, and with whom."""

from __future__ import annotations

import random
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerPairing:
    """A layer's experts relabelled so that partners are neighbours.

    order: new expert id -> source expert id.  New experts 2p and 2p+1 are pair p for ids below `merged`; the others
    stay dense.
    """

    order: list[int]
    merged: int


def pair_randomly(experts: int, sparsity: float, groups: int, tokens: Tensor | None, seed: int) -> LayerPairing:
    """The paper's random pairing.

    sparsity 0.5 merges every expert (with an odd count one stays dense), 0.25 half of them: those that saw the fewest
    calibration tokens; a random half when tokens is None (no calibration).
    groups: group-limited routing sees each group of experts / groups consecutive experts as a unit, so partners come
    from one group and groups stay whole; at 0.25 the half of the groups with the fewest tokens merges.
    tokens: int [experts], calibration tokens per expert.
    Raises ValueError when groups of an odd size cannot be paired.
    """
    rng = random.Random(seed)
    size = experts // groups
    if groups > 1 and size % 2:
        raise ValueError(f"groups of {size} experts cannot be paired inside the group")
    units = (
        [list(range(start, start + size)) for start in range(0, experts, size)]
        if groups > 1
        else [[expert] for expert in range(experts)]
    )
    rng.shuffle(units)
    if tokens is not None and sparsity == 0.25:
        units.sort(key=lambda unit: sum(int(tokens[expert]) for expert in unit))
    chosen = len(units) if sparsity == 0.5 else len(units) // 2
    merged, dense = units[:chosen], units[chosen:]
    if groups == 1 and len(merged) % 2:
        dense.append(merged.pop())
    if groups == 1:
        rng.shuffle(merged)
    for unit in merged:
        rng.shuffle(unit)
    dense.sort()
    first = [expert for unit in merged for expert in unit]
    return LayerPairing(order=first + [expert for unit in dense for expert in unit], merged=len(first))
