"""Trellis words: what a word means depends on the words before it.

The words of a tile of 8 rows x 32 columns are one cyclic stream of bits, and the state of an entry is the 16 bits of it
that end with the entry's own word (fewer in the code with the smallest words).  So few bits choose among many points of
the plane of a pair's two weights: trellis-coded quantisation, as QTIP (arXiv 2406.11235) applies it to the weights of
one matrix.

The points are computed: x = state * MULTIPLIER mod 2^32.  Position 0 is the sum of the low five bits of its four bytes,
less 62; position 1 is the alternating sum (+ - + -) of their high five bits.  Both are integers of -62 to 62, nearly
normal, and exact in bf16.  The weight is the step of its row and group times that.  Of 40 multipliers this one had the
least error for normal weights over all rates; points drawn at random are no better.

The stream runs through a tile in the order in which the lanes of a warp hold it as the A operand of two m16k16
products: place 8 * lane + i, and lane 4g + c has, of row g, columns 2c, 2c + 1, 2c + 8, 2c + 9 and the same plus 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puzzlemoe_vllm.format.codes.base import Decoder, PairCode

TILE_ROWS, TILE_COLUMNS = 8, 32
PLACES = TILE_ROWS * TILE_COLUMNS
"""Entries of a tile."""

MULTIPLIER = 0x794298A3

DEVIATION = (4 * (32**2 - 1) / 12) ** 0.5
"""Of the values at both positions, if their four terms are independent: 18.47."""


def places_of(matrix: Tensor) -> Tensor:
    """A matrix [..., N, K] in the order of its tiles' streams, [..., N / 8, K / 32, 256]; a copy."""
    # [..., N/8, g, K/32, product, half, c, 2]
    tiles: Tensor = matrix.unflatten(-1, (-1, 2, 2, 4, 2)).unflatten(-6, (-1, TILE_ROWS))
    return tiles.movedim((-5, -6, -2), (-6, -5, -4)).flatten(-5)


def matrix_of(places: Tensor) -> Tensor:
    """The inverse of `places_of`."""
    # [..., N/8, K/32, g, c, product, half, 2]
    tiles: Tensor = places.unflatten(-1, (TILE_ROWS, 4, 2, 2, 2))
    return tiles.movedim((-5, -6, -4), (-6, -5, -2)).flatten(-5).flatten(-3, -2)


def values(state: Tensor) -> tuple[Tensor, Tensor]:
    """Values of both positions, float32, of int32 or int64 states of any shape."""
    x = state * MULTIPLIER  # of int32, what is above 2^32 falls off
    low = (x & 31) + (x >> 8 & 31) + (x >> 16 & 31) + (x >> 24 & 31) - 62
    high = (x >> 3 & 31) - (x >> 11 & 31) + (x >> 19 & 31) - (x >> 27 & 31)
    return low.float(), high.float()


class TrellisCode(PairCode):
    """Words of so many bits.

    state_bits: of a state; five words where they have fewer than 16 bits, so that a lane's half of a row is all that
    the next one needs.
    unit_step: the best step for pairs of normal weights of variance 1.
    """

    dtype = torch.uint8
    has_steps = True
    tile = (TILE_ROWS, TILE_COLUMNS)
    largest_value = 62.0

    def __init__(self, bits: int, decoder: Decoder, unit_step: float):
        self.name, self.bits, self.decoder, self.unit_step = f"trellis{bits}", bits, decoder, unit_step
        self.state_bits = min(16, 5 * bits)

    def words_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """As in `PairCode`; a tile is 32 bytes for each bit of a word, and a row of words is a row of tiles."""
        return rows // TILE_ROWS, columns * self.bits

    def matrix_shape(self, words: tuple[int, int]) -> tuple[int, int] | None:
        """As in `PairCode`."""
        rows, columns = words[0] * TILE_ROWS, words[1] // self.bits
        fits = rows % 16 == 0 and columns % TILE_COLUMNS == 0 and columns * self.bits == words[1]
        return (rows, columns) if fits else None

    def pack(self, word: Tensor) -> Tensor:
        """Stored words uint8 [..., N / 8, K * bits] of words [..., N, K], one an entry: streams, lowest bits first."""
        return self.store(places_of(word)).flatten(-2)

    def store(self, stream: Tensor) -> Tensor:
        """uint8 [..., 32 * bits] of a tile's words [..., 256] in the order of its stream."""
        eight = (stream.long().unflatten(-1, (-1, 8)) << self.bits * self._counted(8, stream)).sum(dim=-1)
        stored: Tensor = eight[..., None] >> 8 * self._counted(self.bits, stream) & 255
        return stored.to(torch.uint8).flatten(-2)

    def unpack(self, words: Tensor) -> Tensor:
        """Words uint8 [..., N, K], one an entry, of stored words [..., N / 8, K * bits]."""
        return matrix_of(self._words(words)).to(torch.uint8)

    def states(self, words: Tensor) -> Tensor:
        """int32 states [..., N, K] of stored words [..., N / 8, K * bits]."""
        word = self._words(words)
        state = word << self.state_bits - self.bits
        for back in range(1, -(-self.state_bits // self.bits)):
            shift = self.state_bits - (back + 1) * self.bits
            earlier = word.roll(back, dims=-1)
            state |= earlier << shift if shift >= 0 else earlier >> -shift
        return matrix_of(state)

    def decode(self, words: Tensor, position: int, steps: Tensor | None = None) -> Tensor:
        """bf16 weights [..., N, K] of one position: the product of step and value, rounded to nearest even.

        words: as stored, [..., N / 8, K * bits]; steps: bf16 [..., N, groups].
        """
        assert steps is not None
        grouped: Tensor = values(self.states(words))[position].unflatten(-1, (steps.shape[-1], -1))
        return (grouped * steps.float()[..., None]).flatten(-2).to(torch.bfloat16)

    def _words(self, words: Tensor) -> Tensor:
        """int32 [..., N / 8, K / 32, 256] of stored words, in the order of the streams."""
        stored = words.unflatten(-1, (-1, TILE_COLUMNS, self.bits)).long()
        eight = (stored << 8 * self._counted(self.bits, words)).sum(dim=-1)
        word: Tensor = eight[..., None] >> self.bits * self._counted(8, words) & 2**self.bits - 1
        return word.int().flatten(-2)

    @staticmethod
    def _counted(count: int, like: Tensor) -> Tensor:
        return torch.arange(count, device=like.device)


CODES = [
    TrellisCode(8, Decoder.TRELLIS8, unit_step=1.14 / DEVIATION),
    TrellisCode(6, Decoder.TRELLIS6, unit_step=1.07 / DEVIATION),
    TrellisCode(5, Decoder.TRELLIS5, unit_step=1.05 / DEVIATION),
    TrellisCode(4, Decoder.TRELLIS4, unit_step=1.01 / DEVIATION),
    TrellisCode(3, Decoder.TRELLIS3, unit_step=0.98 / DEVIATION),
]
