"""What all codes of pair words have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import IntEnum

import torch
from torch import Tensor

from puzzlemoe_vllm.errors import UserError

GROUP_SIZES = (128, 64, 32)
"""Input columns that share one step, in the codes that have steps; the first is the usual choice."""

LARGEST = (1 + 127 / 128) * 2.0**16
"""Largest magnitude that the twelve bits of a 16-bit word hold, 130560."""


class Decoder(IntEnum):
    """How words become weights: all that kernels tell codes apart by, and the C library's numbers for it.

    Of the tables, one has words of eight bits and the other of six, in planes; the words' values are data.  Trellises
    differ by the bits of a word.
    """

    MASK16 = 0
    ANGLE16 = 1
    TABLE8 = 2
    TABLE6 = 3
    TRELLIS8 = 4
    TRELLIS6 = 5
    TRELLIS5 = 6
    TRELLIS4 = 7
    TRELLIS3 = 8


class UnencodableWeight(UserError):
    """A weight that no pair word can hold: NaN, infinite, or larger than `LARGEST`."""


class PairCode(ABC):
    """One code.

    name: as config.json spells it.  bits: size of a word.  dtype: of the stored words.  decoder: what decodes them.
    has_steps: whether a bf16 step per row and group of input columns comes with the words.
    largest_value: of the magnitudes that words are, over their step.
    tile: rows and columns of a matrix that are stored together, so that nothing can be cut out of them.
    rules: the rules by which words may be chosen, for a code that can be chosen by more than one; where there are none,
    it is least squares.
    """

    name: str
    bits: int
    dtype: torch.dtype
    decoder: Decoder
    has_steps = False
    largest_value = LARGEST
    tile: tuple[int, int] = (1, 16)
    rules: tuple[str, ...] = ()

    def check_group_size(self, group_size: int | None) -> None:
        """Raises ValueError unless `group_size` is one of `GROUP_SIZES`, or None for a code without steps."""
        if not self.has_steps and group_size is not None:
            raise ValueError(f"{self.name} has no group steps, but group_size is {group_size}")
        if self.has_steps and group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, sorted(GROUP_SIZES)))
            raise ValueError(f"{self.name} has one step per group of {sizes} columns, but group_size is {group_size}")

    def bits_per_pair(self, group_size: int | None) -> float:
        """Stored bits per pair of weights, steps included."""
        return self.bits + (16 / group_size if group_size else 0)

    def words_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the stored words of a pair of [rows, columns] matrices, both multiples of 16."""
        return rows, columns * self.bits // (8 * self.dtype.itemsize)

    def matrix_shape(self, words: tuple[int, int]) -> tuple[int, int] | None:
        """Rows and columns of the matrices whose stored words have a shape; None if no matrix's have."""
        rows, columns = words[0], words[1] * 8 * self.dtype.itemsize // self.bits
        return (rows, columns) if columns % 16 == 0 and self.words_shape(rows, columns) == words else None

    def pack(self, word: Tensor) -> Tensor:
        """Words as they are stored, of words [..., K], one an entry."""
        return word

    def unpack(self, words: Tensor) -> Tensor:
        """Words [..., K], one an entry, of stored words."""
        return words

    def word_table(self, device: torch.device) -> Tensor | None:
        """bf16 [2^bits, 2]: what kernels look words up in, the value at position 0 and 1; None for a code whose words
        they compute with."""
        return None

    @abstractmethod
    def decode(self, words: Tensor, position: int, steps: Tensor | None = None) -> Tensor:
        """bf16 weights [..., K] of one position.

        words: as stored; steps: bf16 [..., groups], K / groups columns each, None for a code without.
        """


class EntrywiseCode(PairCode):
    """A code whose words mean the same in every place: a state, two signs and, in some codes, a magnitude."""

    @abstractmethod
    def encode(self, state: Tensor, negative: tuple[Tensor, Tensor], magnitude: Tensor | None = None) -> Tensor:
        """Stored words of two matrices [N, K].

        state: int [N, K], of the states that the code lists.  negative: two bool tensors [N, K], True where that
        position's weight is below zero.  magnitude: float32 [N, K], not negative, for the codes whose words hold one.
        Raises UnencodableWeight for a magnitude that no word holds.
        """


def check_magnitude(magnitude: Tensor) -> None:
    """Raises UnencodableWeight for a magnitude that twelve bits cannot hold."""
    if not bool((magnitude.to(torch.bfloat16) <= LARGEST).all()):
        raise UnencodableWeight(f"a merged magnitude is NaN, infinite or above {LARGEST:g}")
