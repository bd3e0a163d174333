"""Codes with steps: a weight is the step of its row and group times a value that its word picks from a table."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzlemoe_vllm.format.codes.base import Decoder, EntrywiseCode


@dataclass(frozen=True)
class Packing:
    """How uint8 words [..., K] of so many bits, one a column, are stored, and the decoder that knows it."""

    bits: int
    decoder: Decoder
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]


def _pack_planes(word: Tensor) -> Tensor:
    upper = (word >> 2).unflatten(-1, (-1, 8, 2))
    lower = (word & 3).unflatten(-1, (-1, 4, 4))
    nibbles = upper[..., 0] | upper[..., 1] << 4
    twos = lower[..., 0] | lower[..., 1] << 2 | lower[..., 2] << 4 | lower[..., 3] << 6
    return torch.cat([nibbles, twos], dim=-1).flatten(-2)


def _unpack_planes(words: Tensor) -> Tensor:
    nibbles, twos = words.unflatten(-1, (-1, 12)).split((8, 4), dim=-1)
    upper = torch.stack([nibbles & 15, nibbles >> 4], dim=-1).flatten(-2)
    lower = torch.stack([twos >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)
    return (upper << 2 | lower).flatten(-2)


BYTES = Packing(8, Decoder.TABLE8, lambda word: word, lambda words: words)
"""A byte a word."""

SIX_BIT_PLANES = Packing(6, Decoder.TABLE6, _pack_planes, _unpack_planes)
"""Of every 16 columns, eight bytes hold the upper four bits (column 2j in the low half of byte j), four the lower two
(column 4j lowest)."""


@dataclass(frozen=True)
class ByteSums:
    """That the bytes of a code's values are LEVEL[m] + DIRECTION[d], and what kernels for e4m3 make of them.

    A word has, from its highest bit on, the sign of position 0, the direction d and the level m; the sign of position 1
    is the bit above m (eight bits: three of d and of m) or below the other sign (six bits: two of each).  All bytes are
    below 127, so that (byte + 1) >> 1 is a byte of e4m3: the value that has one bit of mantissa less, odd bytes rounded
    up.

    levels, directions: the bytes; those of direction d at position 0, at position 1 of the last less d.
    e4m3_unit: what the e4m3 values are multiplied by, so that they come nearest to the code's for normal weights.
    """

    levels: tuple[int, ...]
    directions: tuple[int, ...]
    e4m3_unit: float

    @property
    def e4m3_levels(self) -> bytes:
        """Eight bytes which make (level + direction) >> 1 the rounded byte."""
        return bytes(level + 1 for level in self.levels).ljust(8, b"\0")

    @property
    def both_directions(self) -> bytes:
        """Of position 0 and of position 1, eight bytes each."""
        first = bytes(self.directions)
        return first.ljust(8, b"\0") + first[::-1].ljust(8, b"\0")


def minifloat(byte: int) -> float:
    """The value of an E3M4 byte (bit 7 sign, 6..4 exponent, 3..0 mantissa; subnormals, no infinities): the bf16 with
    those seven bits in 9..3 and that sign, times 2^120."""
    exponent, mantissa = byte >> 4 & 7, byte & 15
    value = (mantissa / 16) * 2.0**-6 if exponent == 0 else (1 + mantissa / 16) * 2.0 ** (exponent - 7)
    return -value if byte & 0x80 else value


class TableCode(EntrywiseCode):
    """A code whose words are places in a table.

    values: the value of every word at position 0 and 1, float32 [2, 2^bits].
    magnitudes: the states, distinct pairs of absolute values, float32 [C, 2].
    words: uint8 [C, 2, 2], the word of each by signs (1 for a negative weight at position 0, at position 1).
    unit_step: the best step for pairs of normal weights of variance 1.
    sums: for codes that can be multiplied in e4m3.
    """

    dtype = torch.uint8
    has_steps = True

    def __init__(
        self,
        name: str,
        packing: Packing,
        unit_step: float,
        value_bytes: tuple[list[int], list[int]],
        sums: ByteSums | None = None,
    ):
        """value_bytes: the E3M4 byte of every word's value at position 0, and at position 1."""
        self.name, self.packing, self.unit_step, self.sums = name, packing, unit_step, sums
        self._value_bytes = value_bytes
        self.bits, self.decoder = packing.bits, packing.decoder
        self.values = torch.tensor([[minifloat(byte) for byte in row] for row in value_bytes])
        self.largest_value = float(self.values.abs().max())
        words: dict[tuple[float, float], list[list[int]]] = {}
        for word, (value0, value1) in enumerate(self.values.T.tolist()):
            by_sign = words.setdefault((abs(value0), abs(value1)), [[0, 0], [0, 0]])
            # A weight of 0 has no sign: its word stands for both.
            for negative0 in (value0 < 0, value0 <= 0):
                for negative1 in (value1 < 0, value1 <= 0):
                    by_sign[negative0][negative1] = word
        self.magnitudes = torch.tensor(list(words))
        self.words = torch.tensor(list(words.values()), dtype=torch.uint8)
        self._word_tables: dict[torch.device, Tensor] = {}

    def word_table(self, device: torch.device) -> Tensor:
        """As in `PairCode`; made once for a device, since no graph capture could fetch it.

        By a thread of its own: what this one allocates may come from the pool of one of vLLM's models, which sleep
        level 2 empties, and which must be empty when the model is gone.
        """
        if device not in self._word_tables:
            values = self.values.T.contiguous()
            with ThreadPoolExecutor(1) as thread:
                self._word_tables[device] = thread.submit(values.to, device, torch.bfloat16).result()
        return self._word_tables[device]

    def e4m3_values(self) -> Tensor:
        """float8_e4m3fn [2, 2^bits]: what kernels for e4m3 take a word for at position 0 and 1, in units of
        `sums.e4m3_unit`."""
        rows = [[byte & 0x80 | (byte & 0x7F) + 1 >> 1 for byte in row] for row in self._value_bytes]
        return torch.tensor(rows, dtype=torch.uint8).view(torch.float8_e4m3fn)

    def pack(self, word: Tensor) -> Tensor:
        """As in `PairCode`."""
        return self.packing.pack(word)

    def unpack(self, words: Tensor) -> Tensor:
        """As in `PairCode`."""
        return self.packing.unpack(words)

    def words_of(self, state: Tensor, negative: tuple[Tensor, Tensor]) -> Tensor:
        """uint8 words, one a column, of int32 or int64 rows of `magnitudes` and signs as `encode` takes them."""
        return self.words.to(state.device)[state, negative[0].int(), negative[1].int()]

    def encode(self, state: Tensor, negative: tuple[Tensor, Tensor], magnitude: Tensor | None = None) -> Tensor:
        """Stored words.  state: a row of `magnitudes`.  The magnitude is the step's, so none is given."""
        assert magnitude is None
        return self.pack(self.words_of(state.int(), negative))

    def decode(self, words: Tensor, position: int, steps: Tensor | None = None) -> Tensor:
        """bf16 weights [..., K] of one position: the product of step and value, rounded to nearest even."""
        assert steps is not None
        value = self.values[position].to(words.device)[self.unpack(words).long()]
        grouped: Tensor = value.unflatten(-1, (steps.shape[-1], -1))
        return (grouped * steps.float()[..., None]).flatten(-2).to(torch.bfloat16)
