"""Which experts of a layer merge, and with whom."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import rustworkx
from torch import Tensor

from puzzlemoe_offline.model.families import UnsupportedModel


@dataclass(frozen=True)
class LayerPairing:
    """A layer's experts relabelled so that partners are neighbours.

    order: new expert id -> source expert id.  New experts 2p and 2p+1 are pair p for ids below `merged`; the others
    stay dense.
    spared: source ids of those that stay dense because a pair would lose an expert.
    """

    order: list[int]
    merged: int
    spared: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, merged: list[int], experts: int, spared: list[int]) -> LayerPairing:
        """Experts that merge, partners side by side, of so many; the others stay dense in the order of their ids, so
        that routing groups that do not merge stay whole."""
        return cls(merged + sorted(set(range(experts)) - set(merged)), len(merged), sorted(spared))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Source ids of the partners."""
        return list(zip(self.order[: self.merged : 2], self.order[1 : self.merged : 2], strict=True))

    def without(self, lost: set[int], groups: int) -> LayerPairing:
        """The same, but that the pairs of these experts stay dense; with group-limited routing (`groups` > 1) all pairs
        of their groups, since a group's experts stay neighbours."""
        size = len(self.order) // groups if groups > 1 else 2
        units = [self.order[start : start + size] for start in range(0, self.merged, size)]
        kept = [expert for unit in units if not lost & set(unit) for expert in unit]
        dropped = [expert for unit in units if lost & set(unit) for expert in unit]
        return LayerPairing.of(kept, len(self.order), self.spared + dropped)


COST_BITS, TIE_BITS = 60, 32
"""The matching is exact in whole numbers: a cost's share of the largest in so many bits, and below it a random number,
so that of several matchings of the least cost one is the least, and found whatever way the library goes (isolation
lemma: Mulmuley, Vazirani, Vazirani 1987)."""

PairCosts = Callable[[list[int]], Tensor]
"""The cost of merging any two of n experts, symmetric [n, n]; infinite for two that must not merge."""


def pair_experts(
    experts: int, sparsity: float, groups: int, tokens: Tensor | None, seed: int, costs: PairCosts | None = None
) -> LayerPairing:
    """Partners at random, as in the paper, or with the least sum of costs.

    sparsity 0.5 merges every expert (with an odd count one stays dense), 0.25 half of them: those that saw the fewest
    calibration tokens; a random half when tokens is None (no calibration).
    groups: group-limited routing sees each group of experts / groups consecutive experts as a unit, so partners come
    from one group and groups stay whole; at 0.25 the half of the groups with the fewest tokens merges.  A group with an
    expert that no partner suits stays dense.
    tokens: int [experts], calibration tokens per expert.
    Raises UnsupportedModel when groups of an odd size cannot be paired.
    """
    rng = random.Random(seed)
    order: list[int] = []
    spared: list[int] = []
    for pool in _pools(experts, sparsity, groups, tokens, rng):
        merged = _shuffled(pool, rng) if costs is None or len(pool) < 2 else _matched(pool, costs(pool))
        if len(merged) < len(pool) // 2 * 2:
            merged = [] if groups > 1 else merged
            spared += set(pool) - set(merged)
        order += merged
    return LayerPairing.of(order, experts, spared)


def check_groups(experts: int, groups: int) -> None:
    """Raises UnsupportedModel when the router's groups of experts cannot be paired."""
    size = experts // groups
    if groups > 1 and size % 2:
        raise UnsupportedModel(
            f"group-limited routing with groups of {size} experts: an odd number cannot be paired inside the group; "
            "--method mergemoe merges experts of any number"
        )


def merged_count(experts: int, sparsity: float, groups: int) -> int:
    """How many experts of a layer merge in pairs, if any two may; arguments as in `pair_experts`."""
    pools = _pools(experts, sparsity, groups, None, random.Random(0))
    return sum(len(pool) // 2 * 2 for pool in pools)


def _pools(experts: int, sparsity: float, groups: int, tokens: Tensor | None, rng: random.Random) -> list[list[int]]:
    """Experts that merge, in the pools from which partners come."""
    check_groups(experts, groups)
    unit = experts // groups if groups > 1 else 1
    units = [list(range(start, start + unit)) for start in range(0, experts, unit)]
    rng.shuffle(units)
    if tokens is not None and sparsity == 0.25:
        units.sort(key=lambda unit: sum(int(tokens[expert]) for expert in unit))
    merged = units if sparsity == 0.5 else units[: len(units) // 2]
    return merged if groups > 1 else [[expert for unit in merged for expert in unit]]


def _shuffled(pool: list[int], rng: random.Random) -> list[int]:
    """An even number of the pool's experts, partners side by side."""
    even = pool[: len(pool) // 2 * 2]
    rng.shuffle(even)
    return even


def _matched(pool: list[int], costs: Tensor) -> list[int]:
    """The same, from the minimum-weight matching of as many experts as may merge."""
    values = costs.tolist()
    allowed = [(a, b) for b in range(len(pool)) for a in range(b) if math.isfinite(values[a][b])]
    largest = max((abs(values[a][b]) for a, b in allowed), default=0.0) or 1.0
    ties = random.Random(len(pool))
    graph = rustworkx.PyGraph(multigraph=False)
    graph.add_nodes_from(range(len(pool)))
    for a, b in allowed:
        share = round(values[a][b] / largest * (1 << COST_BITS))
        graph.add_edge(a, b, -(share << TIE_BITS | ties.getrandbits(TIE_BITS)))
    matching = rustworkx.max_weight_matching(graph, max_cardinality=True, weight_fn=int)
    return [pool[member] for pair in sorted(sorted(pair) for pair in matching) for member in pair]


def shared_choices(pairing: LayerPairing, together: Tensor, groups: int) -> tuple[float, float]:
    """How often one token chose both partners of a pair: here, and on average if the partners were drawn at random.

    together: int [experts, experts], tokens that chose both experts; groups: as in `pair_experts`.
    """
    if not pairing.merged:
        return 0.0, 0.0
    here = sum(int(together[pair]) for pair in pairing.pairs)
    size = len(together) // groups if groups > 1 else pairing.merged
    drawn = 0.0
    for start in range(0, pairing.merged, size):
        pool = pairing.order[start : start + size]
        among = together[pool][:, pool]
        drawn += float(among.sum() - among.trace()) / 2 / (size - 1)
    return here, drawn
