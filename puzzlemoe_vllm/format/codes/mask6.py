"""The paper's masks and signs in three bits, since a masked weight needs no sign: bits 4..2 are the state, bit 5, 1 and
0 the level.

States 0..3: both weights, signs in bit 3 and 2; 4 and 5: position 0 alone, sign in bit 2; 6 and 7: position 1.  With
STATE[s] = 0x7F, 0xFF or 0 by position, the value's byte is STATE[s] & (LEVEL[m] | 0x80).
"""

from __future__ import annotations

from puzzlemoe_vllm.format.codes.table import SIX_BIT_PLANES, TableCode

LEVEL = [67, 82, 90, 97, 102, 108, 114, 120]
STATE = [0x7F, 0x7F, 0xFF, 0xFF, 0x7F, 0xFF, 0, 0], [0x7F, 0xFF, 0x7F, 0xFF, 0, 0, 0x7F, 0xFF]


def value_bytes() -> tuple[list[int], list[int]]:
    """Of every word at position 0 and 1."""
    rows: tuple[list[int], list[int]] = ([], [])
    for word in range(64):
        m = word >> 3 & 4 | word & 3
        for row, state in zip(rows, STATE, strict=True):
            row.append(state[word >> 2 & 7] & (LEVEL[m] | 0x80))
    return rows


CODES = [TableCode("mask6", SIX_BIT_PLANES, unit_step=1.975, value_bytes=value_bytes())]
