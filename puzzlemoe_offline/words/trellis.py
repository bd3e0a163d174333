"""The words of a tile of a trellis code: the cyclic path through the states with the least weighted squared error.

Viterbi's algorithm, exact but for the seam of the cycle.  Every place has 2^state_bits states; the 2^bits states that
may come before one differ in the bits that leave it, so all that a place hands on is the least cost of each such group.
Where the cycle closes, the state is that of the best path through the places around the seam, free at its ends; the
tile's path then leads from that state back to it.  With `SEAM` places on either side nothing is lost by that.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzlemoe_vllm.format.codes import TrellisCode
from puzzlemoe_vllm.format.codes.trellis import values

SEAM = 32
"""Places before and after the last one of a tile that choose its state."""

TILES = {"cpu": 4, "cuda": 256}
"""Tiles whose costs of all states are in memory at once: few enough for a CPU's cache, enough to keep a GPU busy."""

PATHS = {"cpu": 32, "cuda": 256}
"""Tiles whose least costs of groups at every place are, so that their paths are read back together."""


def encode(code: TrellisCode, targets: Tensor, weights: Tensor) -> Tensor:
    """The stored words of tiles, uint8 [tiles, 32 * bits].

    targets: float32 [tiles, 256, 2], weights of both positions over their step, in the order of the stream; weights:
    float32 [tiles, 256, 2], of their squared errors.  All are finite, the weights not negative.
    """
    if targets.is_cuda:
        from puzzlemoe_vllm.backends.cuda import unavailable

        if unavailable(targets.device) is None:
            from puzzlemoe_offline.words.trellis_kernels import encode as encode_in_kernel

            return encode_in_kernel(code, targets, weights)
    at_once = PATHS[targets.device.type]
    parts = zip(targets.split(at_once), weights.split(at_once), strict=True)
    return torch.cat([_encode(code, *part) for part in parts])


def _encode(code: TrellisCode, targets: Tensor, weights: Tensor) -> Tensor:
    trellis = _trellis(code, targets.device)
    around = [torch.cat([part[:, -SEAM:], part[:, :SEAM]], dim=1) for part in (targets, weights)]
    seam = trellis.path(around[0], around[1])[:, SEAM - 1]
    states = trellis.path(targets, weights, seam)
    return code.store(states >> code.state_bits - code.bits)


@dataclass(frozen=True)
class _Trellis:
    """The states of a code, in an order in which those of one group are a stride apart: by the bits that leave next.

    states: int64 [S], by place in that order.  features: float32 [4, S], both values and their squares.
    shape: of costs by leaving bits and what is left.  spread: the shape in which costs of groups are added to them.
    group: place of each group by its number, a state without the bits that leave; before: place of the group before
    each state, in the shape of `spread`.
    """

    code: TrellisCode
    states: Tensor
    features: Tensor
    shape: tuple[int, int, int]
    spread: tuple[int, int, int]
    group: Tensor
    before: Tensor

    def path(self, targets: Tensor, weights: Tensor, seam: Tensor | None = None) -> Tensor:
        """int64 [tiles, places], the states of the cheapest path from state `seam` back to it, or from any to any."""
        places = targets.shape[1]
        at_once = TILES[targets.device.type]
        seams = [None] * -(-len(targets) // at_once) if seam is None else seam.split(at_once)
        blocks = zip(targets.split(at_once), weights.split(at_once), seams, strict=True)
        histories, lasts = zip(*(self._forward(*block) for block in blocks), strict=True)
        last = torch.cat(lasts)
        state = self.states[last.argmin(dim=1)] if seam is None else seam
        found = [state]
        leaving = torch.arange(2**self.code.bits, device=targets.device)
        for place in range(places - 2, -1, -1):
            candidates = self._group_before(state)[:, None] << self.code.bits | leaving
            value0, value1 = values(candidates)
            target, weight = targets[:, place, :, None], weights[:, place, :, None]
            cost = weight[:, 0] * (value0 - target[:, 0]).square() + weight[:, 1] * (value1 - target[:, 1]).square()
            history = torch.cat([least[place] for least in histories])
            cost += history.gather(1, self.group[self._group_before(candidates)])
            state = candidates.gather(1, cost.argmin(dim=1, keepdim=True))[:, 0]
            found.append(state)
        return torch.stack(found[::-1], dim=1)

    def _group_before(self, state: Tensor) -> Tensor:
        """Number of the group of states that may come before states."""
        group: Tensor = state & 2 ** (self.code.state_bits - self.code.bits) - 1
        return group

    def _forward(self, targets: Tensor, weights: Tensor, seam: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Least costs of the groups before each place, float32 [tiles, groups], and those of the last place's states,
        [tiles, S]."""
        tiles, places, _ = targets.shape
        terms = torch.cat([-2 * weights * targets, weights], dim=2)
        constant = (weights * targets.square()).sum(dim=2)
        least = targets.new_zeros(tiles, len(self.group))
        if seam is not None:
            least = torch.full_like(least, torch.inf)
            least.scatter_(1, self.group[seam >> self.code.bits][:, None], 0.0)
        costs = targets.new_empty(tiles, len(self.states))
        history = []
        for place in range(places):
            history.append(least)
            torch.mm(terms[:, place], self.features, out=costs)
            before = least.index_select(1, self.before).add_(constant[:, place, None])
            costs.view(tiles, *self.shape).add_(before.view(tiles, *self.spread))
            least = costs.view(tiles, self.shape[0], -1).amin(dim=1)
        return history, costs


@functools.cache
def _trellis(code: TrellisCode, device: torch.device) -> _Trellis:
    words, between = 2**code.bits, 2 ** (code.state_bits - 2 * code.bits)
    state = torch.arange(2**code.state_bits, device=device).view(words, between, words).movedim(2, 0)
    group = torch.arange(words * between, device=device).view(words, between)
    before = group.view(between, words).T
    # The longer one is the inner dimension: sums over short rows are slow.
    if between < words:
        state, group = state.mT, group.T
        shape, spread = (words, between, words), (words, between, 1)
    else:
        shape, spread = (words, words, between), (words, 1, between)
    states = state.flatten()
    value0, value1 = values(states)
    features = torch.stack([value0, value1, value0.square(), value1.square()])
    place = group.flatten().argsort()
    return _Trellis(code, states, features, shape, spread, place, place[before.flatten()])
