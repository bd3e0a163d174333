"""The paper's word: all 65,536 of them, and what encoding adds where the paper is silent."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzlemoe_vllm.format.codes import UnencodableWeight
from puzzlemoe_vllm.format.codes.base import LARGEST
from puzzlemoe_vllm.format.codes.mask16 import BOTH, CODES, FIRST, NEITHER, SECOND, SMALLEST

CODE = CODES[0]
ALL_WORDS = torch.arange(65536, dtype=torch.int32).to(torch.int16)


def algorithm_1(word: int, position: int) -> int:
    """Bits of the bf16 that the paper's Algorithm 1 decodes, one word at a time."""
    if not (word >> (13 - position)) & 1:
        return 0
    sign = (word >> (15 - position)) & 1
    exponent = (word & 0x0F80) + (112 << 7)
    return (sign << 15) | exponent | (word & 0x7F)


def encoded(weight0: torch.Tensor, weight1: torch.Tensor) -> torch.Tensor:
    """Words of a pair whose present weights have one magnitude."""
    state = torch.tensor([[NEITHER, SECOND], [FIRST, BOTH]])[(weight0 != 0).int(), (weight1 != 0).int()]
    return CODE.encode(state, (weight0 < 0, weight1 < 0), torch.maximum(weight0.abs(), weight1.abs()).float())


def encode_one(value: float) -> tuple[float, float]:
    """What both positions decode to when both hold `value`."""
    weight = torch.tensor([[value]])
    words = encoded(weight, weight)
    return CODE.decode(words, 0).item(), CODE.decode(words, 1).item()


@pytest.mark.parametrize("position", [0, 1])
def test_every_word_decodes_as_algorithm_1(position):
    expected = torch.tensor([algorithm_1(word, position) for word in range(65536)], dtype=torch.int32)
    assert torch.equal(CODE.decode(ALL_WORDS, position).view(torch.int16), expected.to(torch.int16))


def test_every_decoded_word_encodes_to_a_word_of_the_same_weights():
    weights = [CODE.decode(ALL_WORDS, position).float().view(256, 256) for position in (0, 1)]
    words = encoded(*weights)
    for position in (0, 1):
        assert torch.equal(CODE.decode(words, position).float(), weights[position])
    assert torch.equal(encoded(*(CODE.decode(words, p).float() for p in (0, 1))), words)


def test_canonical_words_are_fixed_points():
    """A word whose unused bits are zero comes back bit for bit."""
    word = ALL_WORDS.int() & 0xFFFF
    mask = [(word >> (13 - position)) & 1 for position in (0, 1)]
    sign = [(word >> (15 - position)) & 1 for position in (0, 1)]
    unused = ((mask[0] == 0) & (sign[0] == 1)) | ((mask[1] == 0) & (sign[1] == 1))
    unused |= (mask[0] + mask[1] == 0) & (word & 0x0FFF != 0)
    canonical = ALL_WORDS[~unused].view(1, -1)
    again = encoded(*(CODE.decode(canonical, position).float() for position in (0, 1)))
    assert canonical.numel() > 32768
    assert torch.equal(again, canonical)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, 0.0),
        (SMALLEST / 2 * 0.999, 0.0),
        (SMALLEST / 2, SMALLEST),
        (SMALLEST * 0.75, SMALLEST),
        (SMALLEST, SMALLEST),
        (-SMALLEST, -SMALLEST),
        (SMALLEST * (1 + 1 / 256), SMALLEST),
        (SMALLEST * (1 + 3 / 256), SMALLEST * (1 + 2 / 128)),
        (LARGEST, LARGEST),
        (-LARGEST, -LARGEST),
    ],
)
def test_rounding_goes_to_the_nearest_code(value, expected):
    assert encode_one(value) == (expected, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), LARGEST * 1.01, 2.0**17])
def test_what_no_word_holds_is_an_error(value):
    with pytest.raises(UnencodableWeight, match="130560"):
        CODE.encode(torch.tensor([[FIRST]]), (torch.tensor([[False]]),) * 2, torch.tensor([[value]]))


def test_a_masked_entry_may_hold_anything():
    words = CODE.encode(torch.tensor([[NEITHER]]), (torch.tensor([[True]]),) * 2, torch.tensor([[float("nan")]]))
    assert words.item() == 0


@given(st.floats(min_value=-LARGEST, max_value=LARGEST, width=32), st.sampled_from(["both", "first", "second"]))
def test_weights_in_range_round_to_bf16(value, kept):
    state, sign = {"both": BOTH, "first": FIRST, "second": SECOND}[kept], torch.tensor([[value < 0]])
    words = CODE.encode(torch.tensor([[state]]), (sign, ~sign), torch.tensor([[abs(value)]]))
    nearest = torch.tensor(value).to(torch.bfloat16).float().item()
    if abs(value) < SMALLEST:
        nearest = SMALLEST * (1 if value > 0 else -1) if abs(value) >= SMALLEST / 2 else 0.0
    assert CODE.decode(words, 0).item() == (nearest if kept != "second" else 0.0)
    assert CODE.decode(words, 1).item() == (-nearest if kept != "first" else 0.0)
