"""Trellis codes: streams and states against plain integers, tiles against the lanes of a product, every word valid."""

import pytest
import torch
from torch import Tensor

from puzzlemoe_vllm.format.codes import TrellisCode, get_code
from puzzlemoe_vllm.format.codes.trellis import DEVIATION, MULTIPLIER, matrix_of, places_of, values

NAMES = ("trellis8", "trellis6", "trellis5", "trellis4", "trellis3")
STATE_BITS = {"trellis8": 16, "trellis6": 16, "trellis5": 16, "trellis4": 16, "trellis3": 15}


def trellis(name: str) -> TrellisCode:
    code = get_code(name)
    assert isinstance(code, TrellisCode)
    return code


def random_words(code: TrellisCode, rows: int, columns: int) -> Tensor:
    return torch.randint(0, 256, code.words_shape(rows, columns), dtype=torch.uint8)


def values_of(state: int) -> tuple[int, int]:
    """Both values of a state, from the definition."""
    four = (state * MULTIPLIER % 2**32).to_bytes(4, "little")
    a, b, c, d = (byte >> 3 for byte in four)
    return sum(byte & 31 for byte in four) - 62, a - b + c - d


@pytest.mark.parametrize("name", NAMES)
def test_states_are_the_bits_of_a_cyclic_stream(name):
    torch.manual_seed(0)
    code, bits = trellis(name), STATE_BITS[name]
    words = random_words(code, 8, 64)
    states, steps = places_of(code.states(words)), torch.ones(8, 2, dtype=torch.bfloat16)
    values = [places_of(code.decode(words, position, steps)) for position in (0, 1)]
    for tile in (0, 1):
        stored = words[0, tile * 32 * code.bits :][: 32 * code.bits]
        twice = int.from_bytes(bytes(stored.tolist()) * 2, "little")
        for place in range(256):
            end = 256 * code.bits + (place + 1) * code.bits
            # The stream comes round: a state's bits may begin at the tile's other end.
            state = (twice | twice << 512 * code.bits) >> end - bits & 2**bits - 1
            assert states[0, tile, place] == state
            assert (values[0][0, tile, place], values[1][0, tile, place]) == values_of(state)


def test_places_are_those_of_two_products():
    """Of m16k16 products lane 4g + c holds A[g][2c, 2c + 1], A[g + 8][...], A[g][2c + 8, 2c + 9], A[g + 8][...]."""
    places = torch.arange(8 * 64).view(8, 64)
    expected = [
        64 * (lane // 4) + 32 + 16 * product + 8 * half + 2 * (lane % 4) + odd
        for lane in range(32)
        for product in (0, 1)
        for half in (0, 1)
        for odd in (0, 1)
    ]
    assert places_of(places)[0, 1].tolist() == expected


def test_matrices_come_back_from_their_places():
    matrix = torch.randn(2, 48, 160)
    places = places_of(matrix)
    assert places.shape == (2, 6, 5, 256) and torch.equal(matrix_of(places), matrix)
    assert torch.equal(places[1, 2, 3], places_of(matrix[1, 16:24, 96:128])[0, 0])


@pytest.mark.parametrize("name", NAMES)
def test_words_come_back_from_what_is_stored(name):
    torch.manual_seed(1)
    code = trellis(name)
    word = torch.randint(0, 2**code.bits, (3, 16, 96), dtype=torch.uint8)
    stored = code.pack(word)
    assert stored.shape[1:] == code.words_shape(16, 96) == (2, 96 * code.bits)
    assert torch.equal(code.unpack(stored), word)
    bytes_ = random_words(code, 32, 64)
    assert torch.equal(code.pack(code.unpack(bytes_)), bytes_)


@pytest.mark.parametrize("name", NAMES)
def test_every_word_is_a_weight(name):
    torch.manual_seed(2)
    code = trellis(name)
    words = random_words(code, 16, 256)
    steps = torch.rand(16, 4).add(0.5).to(torch.bfloat16)
    for position in (0, 1):
        weight = code.decode(words, position, steps).float()
        assert weight.isfinite().all() and (weight.abs() <= code.largest_value * steps.float().amax()).all()


@pytest.mark.parametrize("name", NAMES)
def test_tiles_stand_alone(name):
    """What a rank cuts out decodes to what it decodes to in the whole matrix."""
    torch.manual_seed(3)
    code = trellis(name)
    words, steps = random_words(code, 32, 128), torch.rand(32, 4).to(torch.bfloat16)
    whole = code.decode(words, 1, steps)
    part = words[1:3, 32 * code.bits : 96 * code.bits]
    assert torch.equal(code.decode(part, 1, steps[8:24, 1:3]), whole[8:24, 32:96])


@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_no_matrix_has(name):
    code = trellis(name)
    assert code.matrix_shape(code.words_shape(48, 160)) == (48, 160)
    for words in ((3, 32 * code.bits), (2, 32 * code.bits + 1), (2, 16 * code.bits)):
        assert code.matrix_shape(words) is None


@pytest.mark.parametrize("name", NAMES)
def test_values_are_nearly_normal(name):
    code = trellis(name)
    both = torch.stack(values(torch.arange(2 ** STATE_BITS[name])))
    assert (both.mean(dim=1).abs() < 1).all() and ((both.std(dim=1) - DEVIATION).abs() < 0.5).all()
    assert abs(torch.corrcoef(both)[0, 1]) < 0.06 and both.abs().max() <= code.largest_value
    assert code.state_bits == STATE_BITS[name]
