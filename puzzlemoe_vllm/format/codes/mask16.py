"""The paper's word (Section 3.2, Algorithm 1): bit 15 and 14 the signs of position 0 and 1, bit 13 and 12 their masks,
bits 11..7 the bf16 exponent less 112, bits 6..0 the bf16 mantissa."""

from __future__ import annotations

import torch
from torch import Tensor

from puzzlemoe_vllm.format.codes.base import Decoder, EntrywiseCode, check_magnitude

EXPONENT_OFFSET = 112
"""bf16 exponent of the smallest magnitude that a word can hold."""

SMALLEST = 2.0 ** (EXPONENT_OFFSET - 127)
"""Smallest non-zero magnitude of a word, 2^-15."""

BOTH, FIRST, SECOND, NEITHER = range(4)
"""States: whose weight is the magnitude; others are 0.  The two masks are the bits of 3 - state."""


class Mask16(EntrywiseCode):
    name = "mask16"
    bits = 16
    dtype = torch.int16
    decoder = Decoder.MASK16
    rules = ("paper", "least-squares")

    def encode(self, state: Tensor, negative: tuple[Tensor, Tensor], magnitude: Tensor | None = None) -> Tensor:
        """int16 words [N, K].  state: BOTH, FIRST, SECOND or NEITHER, whose magnitude may be anything.

        The magnitude is rounded to bf16 (nearest even).  Below `SMALLEST` it goes to the nearer of 0 and `SMALLEST`
        (the midpoint goes up); 0 is masks 00, and masks 00 always is the word 0.
        Raises UnencodableWeight for a magnitude that is NaN, infinite or above `LARGEST`.
        """
        assert magnitude is not None
        exact = magnitude.where(state != NEITHER, 0)
        check_magnitude(exact)
        present = exact >= SMALLEST / 2
        masks = 3 - state.to(torch.int32)
        word = exact.clamp(min=SMALLEST).to(torch.bfloat16).view(torch.int16).to(torch.int32) - (EXPONENT_OFFSET << 7)
        word |= masks << 12
        for position in (0, 1):
            word |= (negative[position] & (masks >> (1 - position))) << (15 - position)
        return word.where(present, 0).to(torch.int16)

    def decode(self, words: Tensor, position: int, steps: Tensor | None = None) -> Tensor:
        """bf16 weights [..., K] of one position; Algorithm 1 for all 65,536 words."""
        # In int16 throughout: half the memory traffic of the plain form.  The sign and mask bits shift into bit 15.
        magnitude = (words & 0x0FFF) + (EXPONENT_OFFSET << 7)
        sign = (words << position) & -0x8000
        kept = (words << (2 + position)) < 0
        return (magnitude | sign).where(kept, 0).view(torch.bfloat16)


CODES = [Mask16()]
