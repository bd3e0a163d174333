"""The words of a tile of a trellis code: the cyclic path through the states with the least weighted squared error.

Viterbi's algorithm, exact but for the seam of the cycle.  Every place has 2^state_bits states; the 2^bits states that
may come before one differ in the bits that leave it, so all that a place hands on is the least cost of each such group.
Where the cycle closes, the state is that of the best path through the places around the seam, free at its ends; the
tile's path then leads from that state back to it.  With `SEAM` places on either side nothing is lost by that.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzlemoe_vllm.format.codes import TrellisCode
from puzzlemoe_vllm.format.codes.trellis import PLACES, values

logger = logging.getLogger(__name__)

PassOn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

LANES = 16
"""Numbers in a CPU's longest vectors."""

SEAM = 32
"""Places before and after the last one of a tile that choose its state."""

COSTS = {"cpu": 1 << 27, "cuda": 1 << 30}
"""Bytes of costs of the tiles whose paths are found together: of all groups at every place, or of all states at one.
The more, the less each tile takes in Python."""


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
    numbers = max(PLACES << code.state_bits - code.bits, 8 << code.state_bits)
    at_once = COSTS[targets.device.type] // (4 * numbers)
    parts = zip(targets.split(at_once), weights.split(at_once), strict=True)
    return torch.cat([_encode(code, *part) for part in parts])


def _encode(code: TrellisCode, targets: Tensor, weights: Tensor) -> Tensor:
    if len(targets) == 1:  # for which torch would compile once more
        return _encode(code, targets.expand(2, -1, -1), weights.expand(2, -1, -1))[:1]
    trellis = _trellis(code, targets.device)
    around = [torch.cat([part[:, -SEAM:], part[:, :SEAM]], dim=1) for part in (targets, weights)]
    seam = trellis.path(around[0], around[1])[:, SEAM - 1]
    states = trellis.path(targets, weights, seam)
    return code.store(states >> code.state_bits - code.bits)


@dataclass(frozen=True)
class _Trellis:
    """The states of a code: a state is the number (word, what stays, what leaves) with the bits of a word in first and
    last place, and its group the number (word, what stays).

    values: of both positions, float32 [what stays, words / lanes, what leaves, lanes], where a vector's lanes are words
    that follow one another.  pass_on: computes `_least_of_groups`.
    """

    code: TrellisCode
    values: tuple[Tensor, Tensor]
    pass_on: PassOn

    def path(self, targets: Tensor, weights: Tensor, seam: Tensor | None = None) -> Tensor:
        """int64 [tiles, places], the states of the cheapest path from state `seam` back to it, or from any to any."""
        targets, weights = targets.transpose(0, 1).contiguous(), weights.transpose(0, 1).contiguous()
        history = self._least(targets, weights, seam)
        leaving = torch.arange(2**self.code.bits, device=targets.device)
        if seam is None:
            every = torch.arange(2**self.code.state_bits, device=targets.device)
            state = self._costs(every[None], targets[-1], weights[-1], history[-1]).argmin(dim=1)
        else:
            state = seam
        found = [state]
        for place in range(len(targets) - 2, -1, -1):
            candidates = self._group_before(state)[:, None] << self.code.bits | leaving
            cost = self._costs(candidates, targets[place], weights[place], history[place])
            state = candidates.gather(1, cost.argmin(dim=1, keepdim=True))[:, 0]
            found.append(state)
        return torch.stack(found[::-1], dim=1)

    def _least(self, targets: Tensor, weights: Tensor, seam: Tensor | None) -> list[Tensor]:
        """Least costs of the groups before each place, float32 [tiles, groups]."""
        words, groups = 2**self.code.bits, 2 ** (self.code.state_bits - self.code.bits)
        least = targets.new_zeros(targets.shape[1], groups)
        if seam is not None:
            least = torch.full_like(least, torch.inf).scatter_(1, (seam >> self.code.bits)[:, None], 0.0)
        history = [least]
        for target, weight in zip(targets[:-1], weights[:-1], strict=True):
            before = history[-1].view(-1, groups // words, 1, words, 1)
            least = self.pass_on(*self.values, target, weight, before)
            history.append(least.view(-1, groups // words, words).mT.reshape(-1, groups))
        return history

    def _costs(self, states: Tensor, target: Tensor, weight: Tensor, before: Tensor) -> Tensor:
        """Least costs of paths to states, int64 [tiles or 1, n], of one place; before: of the groups before it."""
        groups = self._group_before(states).expand(len(before), -1)
        return _errors(*values(states), target[..., None], weight[..., None]) + before.gather(1, groups)

    def _group_before(self, state: Tensor) -> Tensor:
        """Number of the group of states that may come before states."""
        group: Tensor = state & 2 ** (self.code.state_bits - self.code.bits) - 1
        return group


def _errors(value0: Tensor, value1: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared errors [tiles, ...] of values in place of targets [tiles, 2, ...]."""
    error: Tensor = weight[:, 0] * (value0 - target[:, 0]).square() + weight[:, 1] * (value1 - target[:, 1]).square()
    return error


def _least_of_groups(value0: Tensor, value1: Tensor, target: Tensor, weight: Tensor, before: Tensor) -> Tensor:
    """Least costs of paths to groups [tiles, what stays, words / lanes, lanes] at a place with targets and weights
    [tiles, 2]; before: of those to the groups before it, [tiles, what stays, 1, what leaves, 1]."""
    target, weight = (each[:, :, None, None, None, None] for each in (target, weight))
    return (_errors(value0, value1, target, weight) + before).amin(dim=3)


def _compiled(value0: Tensor, value1: Tensor) -> PassOn:
    """`_least_of_groups` of any number of tiles as one loop, which takes a CPU a fraction of the time; as it is where
    torch finds no compiler for C++."""
    compiled: PassOn = torch.compile(_least_of_groups, dynamic=False)
    stays, _, leaves, _ = value0.shape
    tiles = torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, stays, 1, leaves, 1)
    for tensor in tiles:
        torch._dynamo.mark_dynamic(tensor, 0)
    try:
        compiled(value0, value1, *tiles)
    except RuntimeError as reason:
        logger.warning(
            "without a C++ compiler (g++) trellis words take a CPU several times as long: %s",
            str(reason).split("\n")[0],
        )
        return _least_of_groups
    return compiled


@functools.cache
def _trellis(code: TrellisCode, device: torch.device) -> _Trellis:
    words = 2**code.bits
    states = torch.arange(2**code.state_bits, device=device).view(words, -1, words)
    lanes = states.unflatten(0, (-1, min(LANES, words))).permute(2, 0, 3, 1)
    both = values(lanes.contiguous())
    return _Trellis(code, both, _compiled(*both) if device.type == "cpu" else _least_of_groups)
