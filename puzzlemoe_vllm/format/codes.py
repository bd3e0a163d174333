"""What a pair word means: one word holds one weight of two experts.

A code knows bits only.  Choosing *which* magnitude, masks and signs to store is the offline tool's work
(`puzzlemoe_offline.merge`); choosing a memory order for a kernel is a backend's work.

Every code is addressed by position: position 0 is the pair's leader (the even expert id), position 1 its partner.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXPONENT_OFFSET = 112
"""bf16 exponent of the smallest magnitude that a 16-bit pair word can hold."""

SMALLEST = 2.0 ** (EXPONENT_OFFSET - 127)
"""Smallest non-zero magnitude of a 16-bit pair word, 2^-15."""

LARGEST = (1 + 127 / 128) * 2.0 ** (EXPONENT_OFFSET + 31 - 127)
"""Largest magnitude of a 16-bit pair word, 130560."""


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


class Mask16:
    """The paper's word (Section 3.2, Algorithm 1): bit 15 and 14 the signs of position 0 and 1, bit 13 and 12 their
    masks, bits 11..7 the bf16 exponent less 112, bits 6..0 the bf16 mantissa."""

    name = "mask16"
    bits = 16
    dtype = torch.int16

    def check_group_size(self, group_size: int | None) -> None:
        """Raises ValueError unless `group_size` is None: a 16-bit word carries its own exponent."""
        if group_size is not None:
            raise ValueError(f"{self.name} has no group steps, but group_size is {group_size}")

    def words_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the stored words of a pair of [rows, columns] matrices."""
        return rows, columns

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

    def decode(self, words: Tensor, position: int) -> Tensor:
        """bf16 weights [..., K] of one position; Algorithm 1 for all 65,536 words."""
        # In int16 throughout: half the memory traffic of the plain form.  The sign and mask bits shift into bit 15.
        magnitude = (words & 0x0FFF) + (EXPONENT_OFFSET << 7)
        sign = (words << position) & -0x8000
        kept = (words << (2 + position)) < 0
        return (magnitude | sign).where(kept, 0).view(torch.bfloat16)


CODES = {code.name: code for code in (Mask16(),)}


def get_code(name: str) -> Mask16:
    """The code of that name.  Raises ValueError naming the known ones."""
    if name not in CODES:
        raise ValueError(f"unknown pair-word code {name!r}; this version knows {', '.join(sorted(CODES))}")
    return CODES[name]
