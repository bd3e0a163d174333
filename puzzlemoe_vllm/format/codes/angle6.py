"""Bit 5 and 4 the signs of position 0 and 1, 3..2 the direction d, 1..0 the level m.

The value's byte is LEVEL[m] + DIRECTION[d] at position 0 and LEVEL[m] + DIRECTION[3 - d] at position 1: adding float
bits multiplies, nearly.  The tables minimise the squared error of pairs of normal weights.
"""

from __future__ import annotations

from puzzlemoe_vllm.format.codes.table import SIX_BIT_PLANES, ByteSums, TableCode

LEVEL = [46, 62, 72, 81]
DIRECTION = [37, 29, 19, 0]


def value_bytes() -> tuple[list[int], list[int]]:
    """Of every word at position 0 and 1."""
    first, second = [], []
    for word in range(64):
        d, m = word >> 2 & 3, word & 3
        first.append((word << 2 & 0x80) | LEVEL[m] + DIRECTION[d])
        second.append((word << 3 & 0x80) | LEVEL[m] + DIRECTION[3 - d])
    return first, second


SUMS = ByteSums(tuple(LEVEL), tuple(DIRECTION), e4m3_unit=0.9714)
CODES = [TableCode("angle6", SIX_BIT_PLANES, unit_step=2.05, value_bytes=value_bytes(), sums=SUMS)]
