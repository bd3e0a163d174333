"""angle8, angle6 and mask6: every word against its bits, the planes of six-bit words, and the steps."""

import pytest
import torch
from torch import Tensor

from puzzlemoe_vllm.format.codes import TableCode, get_code

NAMES = ("angle8", "angle6", "mask6")


def minifloat(byte: Tensor) -> Tensor:
    """E3M4 bytes through the bf16 whose bits they are, as a kernel does it: float32."""
    bits = (byte & 0x80) << 8 | (byte & 0x7F) << 3
    return bits.to(torch.int16).view(torch.bfloat16).float() * 2.0**120


def by_bits(name: str, word: Tensor, position: int) -> Tensor:
    """Values of int words, from the layouts that the codes document."""
    if name == "mask6":
        level = torch.tensor([67, 82, 90, 97, 102, 108, 114, 120])[word >> 3 & 4 | word & 3]
        alone, upper, lower = word >> 4 & 1 == 1, word >> 3 & 1, word >> 2 & 1
        sign = torch.where(alone, lower, lower if position else upper)
        return minifloat(torch.where(alone & (upper != position), 0, level | sign << 7))
    if name == "angle8":
        level = torch.tensor([18, 35, 45, 50, 55, 59, 64, 69])[word & 7]
        direction, table = word >> 4 & 7, torch.tensor([51, 54, 45, 48, 43, 31, 28, 0])
        sign = word >> (3 if position else 7) & 1
    else:
        level = torch.tensor([46, 62, 72, 81])[word & 3]
        direction, table = word >> 2 & 3, torch.tensor([37, 29, 19, 0])
        sign = word >> (4 if position else 5) & 1
    byte = level + table[len(table) - 1 - direction if position else direction]
    assert byte.max() < 128 and byte.min() >= 16  # no carry into the sign, and no subnormal
    return minifloat(byte | sign << 7)


def every_word(code: TableCode) -> Tensor:
    """uint8 [rows, 32], each word at least once."""
    return torch.arange(2**code.bits, dtype=torch.uint8).view(-1, 32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("position", [0, 1])
def test_every_word_decodes_as_its_bits_say(name, position):
    code = get_code(name)
    word = every_word(code)
    steps = torch.linspace(-3, 3, len(word)).exp2().to(torch.bfloat16)[:, None]
    expected = (by_bits(name, word.int(), position) * steps.float()).to(torch.bfloat16)
    assert torch.equal(code.decode(code.pack(word), position, steps), expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_word_comes_back_from_what_it_decodes_to(name):
    code = get_code(name)
    word, value = every_word(code), code.values.T.reshape(-1, 32, 2)
    state = (code.magnitudes == value.abs()[:, :, None]).all(dim=3).int().argmax(dim=2)
    assert torch.equal(code.magnitudes[state], value.abs())
    assert torch.equal(code.encode(state, (value[..., 0] < 0, value[..., 1] < 0)), code.pack(word))


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_weight_has_no_sign_to_choose(name):
    """Both signs of a zero name a word with the other weight right."""
    code = get_code(name)
    magnitudes, words = code.magnitudes, code.words
    for negative0 in (0, 1):
        for negative1 in (0, 1):
            value = code.values[:, words[:, negative0, negative1].int()].T
            assert torch.equal(value.abs(), magnitudes)
            signs = torch.tensor([negative0, negative1]) == 1
            assert torch.equal((value < 0)[magnitudes > 0], signs.expand_as(value)[magnitudes > 0])


@pytest.mark.parametrize("name", NAMES)
def test_words_of_sixteen_columns_stay_together(name):
    """A slice of the columns is a slice of the bytes, so that tensor parallel ranks can cut stored words."""
    code = get_code(name)
    word = torch.randint(0, 2**code.bits, (5, 96), dtype=torch.uint8)
    stored = code.pack(word)
    assert stored.dtype == code.dtype and stored.shape == code.words_shape(5, 96) == (5, 96 * code.bits // 8)
    assert torch.equal(code.unpack(stored), word)
    cut = 16 * code.bits // 8
    for first in range(0, 96, 16):
        part = stored[:, first * code.bits // 8 :][:, :cut]
        assert torch.equal(part, code.pack(word[:, first : first + 16]))


def test_the_planes_of_six_bit_words():
    code = get_code("angle6")
    word = torch.zeros(1, 16, dtype=torch.uint8)
    word[0, 1], word[0, 6] = 0b101110, 0b000001
    assert code.pack(word).tolist() == [[0b1011 << 4, 0, 0, 0, 0, 0, 0, 0, 0b10 << 2, 0b01 << 4, 0, 0]]


def test_each_group_of_columns_has_its_step():
    code = get_code("angle8")
    word = torch.randint(0, 256, (3, 96), dtype=torch.uint8)
    steps = torch.rand(3, 3).to(torch.bfloat16)
    whole = code.decode(word, 1, steps)
    for group in range(3):
        columns = slice(32 * group, 32 * group + 32)
        assert torch.equal(whole[:, columns], code.decode(word[:, columns], 1, steps[:, group : group + 1]))


@pytest.mark.parametrize("group_size", [None, 0, 16, 48, 256])
def test_group_sizes_that_no_kernel_knows(group_size):
    with pytest.raises(ValueError, match="angle8 has one step per group of 32, 64, 128 columns"):
        get_code("angle8").check_group_size(group_size)
