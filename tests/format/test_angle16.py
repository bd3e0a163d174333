"""angle16: all 65,536 words, and what encoding rounds to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzlemoe_vllm.format.codes import UnencodableWeight, get_code
from puzzlemoe_vllm.format.codes.base import LARGEST

CODE = get_code("angle16")
WORD = torch.arange(65536, dtype=torch.int32)


def fields() -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Magnitude, direction and signs of every word."""
    exponent, mantissa = WORD >> 7 & 31, WORD & 127
    subnormal = mantissa / 128 * 2.0**-14
    magnitude = torch.where(exponent == 0, subnormal, (1 + mantissa / 128) * (exponent - 15.0).exp2())
    return magnitude, WORD >> 12 & 3, (WORD >> 15 & 1 == 1, WORD >> 14 & 1 == 1)


@pytest.mark.parametrize("position", [0, 1])
def test_every_word_is_magnitude_times_direction(position):
    magnitude, direction, negative = fields()
    multiplier = (3 + 4 * direction if position else 15 - 4 * direction) / 16
    expected = (magnitude * multiplier).where(~negative[position], -magnitude * multiplier).to(torch.bfloat16)
    assert torch.equal(CODE.decode(WORD.to(torch.int16), position), expected)


def test_every_word_is_a_fixed_point():
    magnitude, direction, negative = fields()
    assert torch.equal(CODE.encode(direction, negative, magnitude), WORD.to(torch.int16))


@given(st.floats(0, LARGEST, width=32), st.integers(0, 3))
def test_magnitudes_round_to_bf16_and_small_ones_to_multiples_of_two_to_the_minus_21(magnitude, direction):
    column = torch.tensor([magnitude])
    positive = torch.tensor([False])
    word = CODE.encode(torch.tensor([direction]), (positive, positive), column).int()
    rounded = (word & 0x0FFF).to(torch.int16).view(torch.bfloat16).item() * 2.0**112
    assert abs(rounded - magnitude) <= max(magnitude * 2.0**-8, 2.0**-22)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), LARGEST * 1.01])
def test_what_no_word_holds_is_an_error(value):
    with pytest.raises(UnencodableWeight, match="130560"):
        CODE.encode(torch.tensor([0]), (torch.tensor([False]),) * 2, torch.tensor([value]))
