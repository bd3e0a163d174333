"""What a pair word means: one word holds one weight of two experts.

A code knows bits only.  Choosing *which* magnitude, masks and signs to store is the offline tool's work
(`puzzlemoe_offline.words.paper_rule`); choosing a memory order for a kernel is a backend's work.

Every code is addressed by position: position 0 is the pair's leader (the even expert id), position 1 its partner.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

EXPONENT_OFFSET = 112
"""bf16 exponent of the smallest magnitude that a mask16 word can hold."""

SMALLEST = 2.0 ** (EXPONENT_OFFSET - 127)
"""Smallest non-zero magnitude of a mask16 word, 2^-15."""

LARGEST = (1 + 127 / 128) * 2.0 ** (EXPONENT_OFFSET + 31 - 127)
"""Largest magnitude of a 16-bit pair word, 130560."""

GROUP_SIZES = (128, 64, 32)
"""Input columns that share one step, in the codes that have steps; the first is the usual choice."""


class UnencodableWeight(ValueError):
    """A weight that no pair word can hold: NaN, infinite, or larger than `LARGEST`."""


@dataclass(frozen=True)
class MergedPair:
    """The merged form of two weight matrices, before it becomes words; all tensors [N, K].

    magnitude: float32, shared by both positions (paper: W_merged).
    mask: two bool tensors, True where that position keeps the magnitude (paper: M_i, M_j).
    negative: two bool tensors, True where that position's weight is below zero (paper: sign bits).
    """

    magnitude: Tensor
    mask: tuple[Tensor, Tensor]
    negative: tuple[Tensor, Tensor]

    def weight(self, position: int) -> Tensor:
        """The float32 weights [N, K] of one position, before rounding to words."""
        signed = torch.where(self.negative[position], -self.magnitude, self.magnitude)
        return torch.where(self.mask[position], signed, torch.zeros_like(signed))


class PairCode(ABC):
    """What all codes have in common.

    name: as config.json spells it.  bits: size of a word.  dtype: of the stored words.
    """

    name: str
    bits: int
    dtype: torch.dtype
    rules: tuple[str, ...] = ()
    """Rules by which its words may be chosen; empty where it is always least squares."""
    has_grid = False
    """Whether a bf16 step per row and group of input columns comes with the words (`puzzle_grid`)."""

    def check_group_size(self, group_size: int | None) -> None:
        """Raises ValueError unless `group_size` is one of `GROUP_SIZES`, or None for a code without steps."""
        if not self.has_grid and group_size is not None:
            raise ValueError(f"{self.name} has no group steps, but group_size is {group_size}")
        if self.has_grid and group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, sorted(GROUP_SIZES)))
            raise ValueError(f"{self.name} has one step per group of {sizes} columns, but group_size is {group_size}")

    def bits_per_pair(self, group_size: int | None) -> float:
        """Stored bits per pair of weights, steps included."""
        return self.bits + (16 / group_size if group_size else 0)

    def words_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the stored words of a pair of [rows, columns] matrices; columns a multiple of 16."""
        return rows, columns * self.bits // (8 * self.dtype.itemsize)

    @abstractmethod
    def decode(self, words: Tensor, position: int, grid: Tensor | None = None) -> Tensor:
        """bf16 weights [..., K] of one position.

        words: as stored, [..., K words]; grid: bf16 steps [..., groups], K / groups columns each, None without steps.
        """


class Mask16(PairCode):
    """The paper's word (Section 3.2, Algorithm 1): bit 15 and 14 the signs of position 0 and 1, bit 13 and 12 their
    masks, bits 11..7 the bf16 exponent less 112, bits 6..0 the bf16 mantissa."""

    name = "mask16"
    bits = 16
    rules = ("paper", "least-squares")
    dtype = torch.int16

    def encode(self, pair: MergedPair) -> Tensor:
        """int16 words [N, K] of a merged pair.

        The magnitude is rounded to bf16 (nearest even).  Below `SMALLEST` it goes to the nearer of 0 and `SMALLEST`
        (the midpoint goes up); 0 is masks 00, and masks 00 always is the word 0.
        Raises UnencodableWeight for a magnitude that is NaN, infinite or above `LARGEST` where a mask is set.
        """
        exact = pair.magnitude.where(pair.mask[0] | pair.mask[1], 0)
        if not bool((exact.to(torch.bfloat16) <= LARGEST).all()):
            raise UnencodableWeight(f"a merged magnitude is NaN, infinite or above {LARGEST:g}")
        present = exact >= SMALLEST / 2
        word = exact.clamp(min=SMALLEST).to(torch.bfloat16).view(torch.int16).to(torch.int32) - (EXPONENT_OFFSET << 7)
        for position in (0, 1):
            mask = pair.mask[position]
            word += mask.to(torch.int32) << (13 - position)
            word += (mask & pair.negative[position]).to(torch.int32) << (15 - position)
        return word.where(present, 0).to(torch.int16)

    def decode(self, words: Tensor, position: int, grid: Tensor | None = None) -> Tensor:
        """bf16 weights [..., K] of one position; Algorithm 1 for all 65,536 words."""
        # In int16 throughout: half the memory traffic of the plain form.  The sign and mask bits shift into bit 15.
        magnitude = (words & 0x0FFF) + (EXPONENT_OFFSET << 7)
        sign = (words << position) & -0x8000
        kept = (words << (2 + position)) < 0
        return (magnitude | sign).where(kept, 0).view(torch.bfloat16)


class Angle16(PairCode):
    """The paper's word with directions in place of masks: the vector (|w0|, |w1|) is a magnitude times one of four
    directions, (15, 3), (11, 7), (7, 11) and (3, 15) sixteenths - 11, 32, 58 and 79 degrees.

    Bit 15 and 14 are the signs of position 0 and 1, bits 13 and 12 the direction d, bits 11..0 the magnitude: the low
    12 bits of a bf16, times 2^112 (so a zero exponent field means a subnormal, and 0 is 0).

    Directions are linear in d, so that no table is needed: with d moved to bits 6 and 5 below the exponent of 1.0,
    b = 1 + d/4 is a bf16, and the multiplier (15 - 4d)/16 = 31/16 - b at position 0, (3 + 4d)/16 = b - 13/16 at
    position 1.  Two weights take 5 instructions at position 0 (LOP3 `w & 0x8FFF8FFF`; SHF and LOP3 for b; HFMA2 for the
    multiplier times 2^112; HMUL2) and 7 at position 1, whose sign is not in place.
    """

    name = "angle16"
    bits = 16
    dtype = torch.int16
    directions = 4

    @staticmethod
    def multipliers(position: int) -> list[float]:
        """By direction."""
        return [((15 - 4 * d) if position == 0 else (3 + 4 * d)) / 16 for d in range(4)]

    def encode(self, magnitude: Tensor, direction: Tensor, negative: tuple[Tensor, Tensor]) -> Tensor:
        """int16 words [N, K].  magnitude: float32; direction: int 0..3; negative: two bool tensors; all [N, K].

        Raises UnencodableWeight for a magnitude that is NaN, infinite or above `LARGEST`.
        """
        if not bool((magnitude.to(torch.bfloat16) <= LARGEST).all()):
            raise UnencodableWeight(f"a merged magnitude is NaN, infinite or above {LARGEST:g}")
        word = (magnitude * 2.0**-112).to(torch.bfloat16).view(torch.int16).to(torch.int32)
        word |= direction.to(torch.int32) << 12
        for position in (0, 1):
            word |= negative[position].to(torch.int32) << (15 - position)
        return word.to(torch.int16)

    def decode(self, words: Tensor, position: int, grid: Tensor | None = None) -> Tensor:
        """bf16 weights [..., K] of one position: the product of magnitude and multiplier, rounded to nearest even."""
        word = words.to(torch.int32)
        magnitude = (word & 0x0FFF).to(torch.int16).view(torch.bfloat16).float() * 2.0**112
        multiplier = torch.tensor(self.multipliers(position), device=words.device)[(word >> 12) & 3]
        negative = (word >> (15 - position)) & 1 == 1
        weight = magnitude * multiplier
        return torch.where(negative, -weight, weight).to(torch.bfloat16)


def minifloat(byte: int) -> float:
    """The value of an E3M4 byte (bit 7 sign, 6..4 exponent, 3..0 mantissa; subnormals, no infinities): the bf16 with
    those seven bits in 9..3 and that sign, times 2^120."""
    exponent, mantissa = byte >> 4 & 7, byte & 15
    value = (mantissa / 16) * 2.0**-6 if exponent == 0 else (1 + mantissa / 16) * 2.0 ** (exponent - 7)
    return -value if byte & 0x80 else value


class GridCode(PairCode):
    """A code with group steps: a weight is the step of its row and group times a value that its word picks.

    values: the value of every word at position 0 and 1, float32 [2, 2^bits].
    magnitudes: the distinct pairs of absolute values, float32 [C, 2].
    words: uint8 [C, 2, 2], the word of each by signs (1 for a negative weight at position 0, at position 1).
    Values are E3M4 bytes, sums or bit-selects of two byte tables with at most eight entries, so that a device may look
    four of them up with one byte permute per table, or a whole word in one table (`word_table`).
    unit_step: the best step for pairs of normal weights of variance 1.
    """

    dtype = torch.uint8
    has_grid = True

    def __init__(self, name: str, bits: int, unit_step: float, value_bytes: tuple[list[int], list[int]]):
        self.name, self.bits, self.unit_step = name, bits, unit_step
        self.values = torch.tensor([[minifloat(byte) for byte in row] for row in value_bytes])
        words: dict[tuple[float, float], list[list[int]]] = {}
        for word, (value0, value1) in enumerate(self.values.T.tolist()):
            by_sign = words.setdefault((abs(value0), abs(value1)), [[0, 0], [0, 0]])
            # A weight of 0 has no sign: its word stands for both.
            for negative0 in (value0 < 0, value0 <= 0):
                for negative1 in (value1 < 0, value1 <= 0):
                    by_sign[negative0][negative1] = word
        self.magnitudes = torch.tensor(list(words))
        self.words = torch.tensor(list(words.values()), dtype=torch.uint8)

    def pack(self, word: Tensor) -> Tensor:
        """Stored words of uint8 words [N, K], one a column.

        Six-bit words are cut into planes: of every 16 columns, eight bytes hold the upper four bits (column 2j in the
        low half of byte j), four the lower two (column 4j lowest).
        """
        if self.bits == 8:
            return word
        upper = (word >> 2).unflatten(-1, (-1, 8, 2))
        lower = (word & 3).unflatten(-1, (-1, 4, 4))
        nibbles = upper[..., 0] | upper[..., 1] << 4
        twos = lower[..., 0] | lower[..., 1] << 2 | lower[..., 2] << 4 | lower[..., 3] << 6
        return torch.cat([nibbles, twos], dim=-1).flatten(-2)

    def unpack(self, words: Tensor) -> Tensor:
        """uint8 words [..., K], one a column, of stored words."""
        if self.bits == 8:
            return words
        nibbles, twos = words.unflatten(-1, (-1, 12)).split((8, 4), dim=-1)
        upper = torch.stack([nibbles & 15, nibbles >> 4], dim=-1).flatten(-2)
        lower = torch.stack([twos >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)
        return (upper << 2 | lower).flatten(-2)

    def decode(self, words: Tensor, position: int, grid: Tensor | None = None) -> Tensor:
        """bf16 weights [..., K] of one position: the product of step and value, rounded to nearest even."""
        assert grid is not None
        value = self.values[position].to(words.device)[self.unpack(words).long()]
        return (value.unflatten(-1, (grid.shape[-1], -1)) * grid.float()[..., None]).flatten(-2).to(torch.bfloat16)


def _angle8() -> GridCode:
    """Bit 7 the sign of position 0, 6..4 the direction d, bit 3 the sign of position 1, 2..0 the level m.

    The value's byte is LEVEL[m] + DIRECTION[d] at position 0 and LEVEL[m] + DIRECTION[7 - d] at position 1: adding
    float bits multiplies, nearly.  The tables minimise the squared error of pairs of normal weights (0.0090 of their
    energy; the best circles times evenly spaced angles leave 0.0096).

    The CUDA kernels look a word up in `word_table`, whose entry has both positions' values: three instructions a word
    (PRMT for the byte, IMAD for the address, LDS), two where the table's place lets the PRMT make the address, and one
    PRMT for two weights of a position, so 6 or 8 for the four weights of two words.  Byte permutes and float-bit sums
    instead take 13, most of them for the integer pipe, and were slower on an H100.
    """
    level = [18, 35, 45, 50, 55, 59, 64, 69]
    direction = [51, 54, 45, 48, 43, 31, 28, 0]
    rows: tuple[list[int], list[int]] = ([], [])
    for word in range(256):
        d, m = word >> 4 & 7, word & 7
        rows[0].append((word & 0x80) | level[m] + direction[d])
        rows[1].append((word << 4 & 0x80) | level[m] + direction[7 - d])
    return GridCode("angle8", 8, 2.0, rows)


def _angle6() -> GridCode:
    """Bit 5 and 4 the signs of position 0 and 1, 3..2 the direction, 1..0 the level; bytes as in angle8."""
    level = [46, 62, 72, 81]
    direction = [37, 29, 19, 0]
    rows: tuple[list[int], list[int]] = ([], [])
    for word in range(64):
        d, m = word >> 2 & 3, word & 3
        rows[0].append((word << 2 & 0x80) | level[m] + direction[d])
        rows[1].append((word << 3 & 0x80) | level[m] + direction[3 - d])
    return GridCode("angle6", 6, 2.05, rows)


def _mask6() -> GridCode:
    """The paper's masks and signs in three bits, since a masked weight needs no sign: bits 4..2 are the state, bit 5, 1
    and 0 the level.

    States 0..3: both weights, signs in bit 3 and 2; 4 and 5: position 0 alone, sign in bit 2; 6 and 7: position 1.
    With STATE[s] = 0x7F, 0xFF or 0 by position, the value's byte is STATE[s] & (LEVEL[m] | 0x80).
    """
    level = [67, 82, 90, 97, 102, 108, 114, 120]
    states = ([0x7F, 0x7F, 0xFF, 0xFF, 0x7F, 0xFF, 0, 0], [0x7F, 0xFF, 0x7F, 0xFF, 0, 0, 0x7F, 0xFF])
    rows: tuple[list[int], list[int]] = ([], [])
    for word in range(64):
        m = word >> 3 & 4 | word & 3
        for row, state in zip(rows, states, strict=True):
            row.append(state[word >> 2 & 7] & (level[m] | 0x80))
    return GridCode("mask6", 6, 1.975, rows)


CODES: dict[str, PairCode] = {code.name: code for code in (Mask16(), Angle16(), _angle8(), _angle6(), _mask6())}


def get_code(name: str) -> PairCode:
    """The code of that name.  Raises ValueError naming the known ones."""
    if name not in CODES:
        raise ValueError(f"unknown pair-word code {name!r}; this version knows {', '.join(sorted(CODES))}")
    return CODES[name]


@functools.cache
def word_table(name: str, device: torch.device) -> Tensor:
    """bf16 [2^bits, 2]: what kernels look the words of a code with steps up in, the value at position 0 and 1."""
    code = get_code(name)
    assert isinstance(code, GridCode)
    return code.values.T.contiguous().to(device, torch.bfloat16)
