"""The paper's word with directions in place of masks: the vector (|w0|, |w1|) is a magnitude times one of four
directions, (15, 3), (11, 7), (7, 11) and (3, 15) sixteenths - 11, 32, 58 and 79 degrees.

Bit 15 and 14 are the signs of position 0 and 1, bits 13 and 12 the direction d, bits 11..0 the magnitude: the low 12
bits of a bf16, times 2^112 (so a zero exponent field means a subnormal, and 0 is 0).

Directions are linear in d, so that no table is needed: with d moved to bits 6 and 5 below the exponent of 1.0,
b = 1 + d/4 is a bf16, and the multiplier (15 - 4d)/16 = 31/16 - b at position 0, (3 + 4d)/16 = b - 13/16 at position 1.
Two weights take 5 instructions at position 0 (LOP3 `w & 0x8FFF8FFF`; SHF and LOP3 for b; HFMA2 for the multiplier times
2^112; HMUL2) and 7 at position 1, whose sign is not in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puzzlemoe_vllm.format.codes.base import Decoder, EntrywiseCode, check_magnitude


class Angle16(EntrywiseCode):
    name = "angle16"
    bits = 16
    dtype = torch.int16
    decoder = Decoder.ANGLE16

    @staticmethod
    def multipliers(position: int) -> list[float]:
        """By direction."""
        return [((15 - 4 * d) if position == 0 else (3 + 4 * d)) / 16 for d in range(4)]

    def encode(self, state: Tensor, negative: tuple[Tensor, Tensor], magnitude: Tensor | None = None) -> Tensor:
        """int16 words [N, K].  state: the direction, 0..3.

        Raises UnencodableWeight for a magnitude that is NaN, infinite or above `LARGEST`.
        """
        assert magnitude is not None
        check_magnitude(magnitude)
        word = (magnitude * 2.0**-112).to(torch.bfloat16).view(torch.int16).to(torch.int32)
        word |= state.to(torch.int32) << 12
        for position in (0, 1):
            word |= negative[position].to(torch.int32) << (15 - position)
        return word.to(torch.int16)

    def decode(self, words: Tensor, position: int, steps: Tensor | None = None) -> Tensor:
        """bf16 weights [..., K] of one position: the product of magnitude and multiplier, rounded to nearest even."""
        word = words.to(torch.int32)
        magnitude = (word & 0x0FFF).to(torch.int16).view(torch.bfloat16).float() * 2.0**112
        multiplier = torch.tensor(self.multipliers(position), device=words.device)[(word >> 12) & 3]
        negative = (word >> (15 - position)) & 1 == 1
        weight = magnitude * multiplier
        return torch.where(negative, -weight, weight).to(torch.bfloat16)


CODES = [Angle16()]
