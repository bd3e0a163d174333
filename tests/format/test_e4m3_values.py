"""What kernels for e4m3 take the words of a code for."""

import pytest
import torch

from puzzlemoe_vllm.format.codes import CODES, TableCode

WITH_E4M3 = [code for code in CODES.values() if isinstance(code, TableCode) and code.sums]
FIELDS = {8: (7, 4, 3, 3, 0), 6: (5, 2, 2, 4, 0)}
"""Of a word: the bits of sign 0, direction (and its width), sign 1 and level."""


def test_the_angle_codes_with_steps_have_them():
    assert {code.name for code in WITH_E4M3} == {"angle8", "angle6"}


@pytest.mark.parametrize("code", WITH_E4M3, ids=lambda code: code.name)
def test_two_tables_and_a_shift_give_every_word_its_e4m3_byte(code):
    sign0, direction, width, sign1, level = FIELDS[code.bits]
    words = torch.arange(1 << code.bits)
    levels, directions = torch.tensor(list(code.sums.e4m3_levels)), torch.tensor(list(code.sums.both_directions))
    mask = (1 << width) - 1
    for position, sign in enumerate((sign0, sign1)):
        sums = levels[words >> level & mask] + directions[8 * position + (words >> direction & mask)]
        assert int(sums.max()) < 256
        expected = (sums >> 1) | (words >> sign & 1) << 7
        assert torch.equal(code.e4m3_values()[position].view(torch.uint8).long(), expected)


@pytest.mark.parametrize("code", WITH_E4M3, ids=lambda code: code.name)
def test_they_are_near_the_codes_own(code):
    """Within half a step of e4m3's three bits of mantissa, after the constant."""
    ratio = code.e4m3_values().float() * code.sums.e4m3_unit / code.values
    assert ((ratio - 1).abs() < 2**-4).all()
    assert (ratio - 1).mean().abs() < 0.01


@pytest.mark.parametrize(("name", "most"), [("angle8", 1.06), ("angle6", 1.015)])
def test_they_add_little_to_the_error_of_normal_pairs(name, most):
    code = CODES[name]
    assert isinstance(code, TableCode) and code.sums
    pairs = torch.randn(20000, 2, generator=torch.Generator().manual_seed(0)).abs() / code.unit_step
    state = torch.cdist(pairs, code.magnitudes).argmin(dim=1)
    words = code.words[state, 0, 0].long()
    own, rounded = code.values[:, words].T, code.e4m3_values()[:, words].T.float() * code.sums.e4m3_unit
    assert ((pairs - rounded) ** 2).sum() < most * ((pairs - own) ** 2).sum()
