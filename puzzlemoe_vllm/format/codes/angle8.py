"""Bit 7 the sign of position 0, 6..4 the direction d, bit 3 the sign of position 1, 2..0 the level m.

The value's byte is LEVEL[m] + DIRECTION[d] at position 0 and LEVEL[m] + DIRECTION[7 - d] at position 1: adding float
bits multiplies, nearly.  The tables minimise the squared error of pairs of normal weights (0.0090 of their energy; the
best circles times evenly spaced angles leave 0.0096).

The CUDA kernels look a word up in its table, whose entry has both positions' values: three instructions a word (PRMT
for the byte, IMAD for the address, LDS), two where the table's place lets the PRMT make the address, and one PRMT for
two weights of a position, so 6 or 8 for the four weights of two words.  Byte permutes and float-bit sums instead take
13, most of them for the integer pipe, and were slower on an H100.
"""

from __future__ import annotations

from puzzlemoe_vllm.format.codes.table import BYTES, ByteSums, TableCode

LEVEL = [18, 35, 45, 50, 55, 59, 64, 69]
DIRECTION = [51, 54, 45, 48, 43, 31, 28, 0]


def value_bytes() -> tuple[list[int], list[int]]:
    """Of every word at position 0 and 1."""
    first, second = [], []
    for word in range(256):
        d, m = word >> 4 & 7, word & 7
        first.append((word & 0x80) | LEVEL[m] + DIRECTION[d])
        second.append((word << 4 & 0x80) | LEVEL[m] + DIRECTION[7 - d])
    return first, second


SUMS = ByteSums(tuple(LEVEL), tuple(DIRECTION), e4m3_unit=0.979)
CODES = [TableCode("angle8", BYTES, unit_step=2.0, value_bytes=value_bytes(), sums=SUMS)]
