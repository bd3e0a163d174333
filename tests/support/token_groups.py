"""The groups of tokens that the CUDA library makes of what a router chose."""

from __future__ import annotations

import torch
from torch import Tensor


def token_groups(counts: list[int], part: int, pairs: int) -> Tensor:
    """int32 [groups, 8], as cuda/routing.cu plans them for experts with so many tokens: `TokenGroup`.

    counts: of the two experts of each of the pairs, then of dense experts.  part: most tokens of a part; one that has
    none begins at row 0 and is of position 0.
    """
    groups: list[list[int]] = []
    row = 0
    of_pairs, dense = counts[: 2 * pairs], counts[2 * pairs :]
    units = [*zip(of_pairs[::2], of_pairs[1::2], strict=True), *((count, 0) for count in dense)]
    for unit, (first, second) in enumerate(units):
        parts = [(0, start, min(part, first - start)) for start in range(0, first, part)]
        parts += [(1, first + start, min(part, second - start)) for start in range(0, second, part)]
        leader, size = len(groups), (len(parts) + 1) // 2
        for two in zip(parts[::2], [*parts[1::2], (0, -row, 0)][:size], strict=True):
            positions = two[0][0] | two[1][0] << 1
            groups.append([unit, leader, size, positions, *(row + p[1] for p in two), *(p[2] for p in two)])
        row += first + second
    return torch.tensor(groups, dtype=torch.int32).view(-1, 8)
