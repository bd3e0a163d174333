"""The order in which CUDA kernels read words and steps, the choice of a kernel, the pieces of a call; no GPU needed."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from puzzlemoe_vllm.backends import ExpertWeights, cuda
from puzzlemoe_vllm.format.codes import CODES, TrellisCode, get_code


@pytest.mark.parametrize("gate_up", [False, True])
def test_tiles_hold_each_element_where_its_lane_reads_it(gate_up):
    rows, columns = 64, 48
    matrix = torch.arange(rows * columns, dtype=torch.int32).view(rows, columns)
    tiles = cuda.tile(matrix, gate_up)
    assert torch.equal(tiles.flatten().sort().values, matrix.flatten())
    for strip, column, lane, element in ((0, 0, 0, 0), (1, 2, 31, 7), (3, 1, 13, 2), (2, 0, 5, 5)):
        group, pair = lane // 4, lane % 4
        lower, right = element // 2 % 2, element // 4
        row = strip * 16 + group + 8 * lower
        if gate_up:
            row = strip * 8 + group + (rows // 2) * lower
        expected = matrix[row, column * 16 + 2 * pair + element % 2 + 8 * right]
        assert tiles[strip, column, lane * 8 + element] == expected


@pytest.mark.parametrize("strips, tiles", [(1, 1), (3, 5), (8, 4), (9, 3), (11, 22), (16, 8), (24, 6)])
def test_blocks_come_in_the_order_of_tile_offset(strips, tiles):
    """As tile_offset in grouped.cuh computes it."""
    numbered = torch.arange(strips * tiles).view(strips, tiles, 1)
    ordered = cuda.blocks(numbered)
    for strip, tile in itertools.product(range(strips), range(tiles)):
        first_strip, first_tile = strip // 8 * 8, tile // 4 * 4
        height, width = min(8, strips - first_strip), min(4, tiles - first_tile)
        offset = first_strip * tiles + first_tile * height + (strip - first_strip) * width + tile - first_tile
        assert ordered[offset] == numbered[strip, tile]


def test_kernel_words_swap_two_bits():
    words = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    kernel = cuda.kernel_words(words, get_code("mask16"))
    assert torch.equal(cuda.kernel_words(kernel, get_code("mask16")), words)
    bit = lambda tensor, index: tensor.int() >> index & 1  # noqa: E731
    assert torch.equal(bit(kernel, 14), bit(words, 13)) and torch.equal(bit(kernel, 13), bit(words, 14))
    assert torch.equal(kernel & ~0x6000, words & ~0x6000)


def test_kernel_word_is_the_leaders_weight_times_2_to_16():
    """The identity that the kernels' decoding rests on, for every word with the leader's mask."""
    words = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    kernel = cuda.kernel_words(words, get_code("mask16"))
    for position in (0, 1):
        value = ((kernel.int() << 2 * position) & 0xC000) | (kernel.int() & 0x0FFF)
        scaled = value.to(torch.uint16).view(torch.bfloat16).double() / 65536
        exact = get_code("mask16").decode(words, position).double()
        assert torch.equal(scaled.where(exact != 0, 0), exact)
        assert scaled.where(exact == 0, 0).abs().max() < 4e-34


def test_six_bit_words_are_one_number_a_lane():
    """A lane's eight words: 48 bits, the lanes' lower 32 first, then their upper 16."""
    words = torch.randint(0, 64, (3, 2, 256), dtype=torch.uint8)
    kernel = cuda.kernel_words(words, get_code("angle6"))
    assert kernel.shape == (3, 2, 192)
    for lane in (0, 5, 31):
        number = sum(int(word) << 6 * i for i, word in enumerate(words[1, 1, lane * 8 : lane * 8 + 8]))
        lower, upper = kernel[1, 1, lane * 4 : lane * 4 + 4], kernel[1, 1, 128 + lane * 2 : 130 + lane * 2]
        assert bytes([*lower.tolist(), *upper.tolist()]) == number.to_bytes(6, "little")


def test_eight_bit_words_stay_as_they_are():
    words = torch.randint(0, 256, (3, 2, 256), dtype=torch.uint8)
    assert torch.equal(cuda.kernel_words(words, get_code("angle8")), words)


def kernel_states(tile: bytes, before: bytes, odd: bool, bits: int) -> list[list[list[int]]]:
    """States [lane][run][4] of a tile in kernel order, as cuda/trellis_words.cuh finds them; before: the tile beside it
    that has the same 32 columns."""

    def run(tile: bytes, lane: int, run: int, odd: bool) -> int:
        if bits == 8:
            return int.from_bytes(tile[8 * lane + 4 * run : 8 * lane + 4 * run + 4], "little")
        if bits <= 4:
            planes = (8,) if bits == 4 else (4, 2)
            both = b"".join(
                two_tiles[32 * sum(planes[:i]) + size * lane : 32 * sum(planes[:i]) + size * (lane + 1)]
                for i, size in enumerate(planes)
            )
            return int.from_bytes(both, "little") >> 4 * bits * (2 * run + odd) & (1 << 4 * bits) - 1
        left = 4 * bits - 16
        size = left // 4
        rest = int.from_bytes(tile[128 + size * lane : 128 + size * (lane + 1)], "little")
        return (tile[4 * lane + 2 * run] | tile[4 * lane + 2 * run + 1] << 8) << left | rest >> left * run & (
            1 << left
        ) - 1

    two_tiles = before + tile if odd else tile + before
    states = []
    for lane in range(32):
        windows = [
            run(tile, lane, half, odd) << 4 * bits | run(before, lane if odd else (lane - 1) % 32, half, not odd)
            for half in (0, 1)
        ]
        state_bits = min(16, 5 * bits)
        first = [5 * bits - state_bits + bits * i for i in range(4)]
        states.append([[window >> at & (1 << state_bits) - 1 for at in first] for window in windows])
    return states


@pytest.mark.parametrize("gate_up", [False, True])
@pytest.mark.parametrize(
    "code", [code for code in CODES.values() if isinstance(code, TrellisCode)], ids=lambda c: c.name
)
def test_trellis_states_are_those_of_the_format(code, gate_up):
    """Of every entry, whose state comes from its lane's runs and the end of those before them."""
    rows, columns = 32, 64
    words = torch.randint(0, 256, code.words_shape(rows, columns), dtype=torch.uint8)
    expected = cuda.tile(code.states(words), gate_up)
    tiles = cuda.kernel_words(cuda.tile(code.unpack(words), gate_up), code)
    assert tiles.shape == (2, 4, 32 * code.bits) and tiles.dtype == torch.uint8
    for strip, column in itertools.product(range(2), range(4)):
        own, beside = (bytes(tiles[strip, at].tolist()) for at in (column, column ^ 1))
        states = torch.tensor(kernel_states(own, beside, column % 2 == 1, code.bits))
        # [lane, run, right, 2] in the order of a tile's elements
        elements = states.unflatten(-1, (2, 2)).transpose(1, 2).flatten()
        assert torch.equal(elements, expected[strip, column])


@pytest.mark.parametrize("name", ["trellis8", "trellis3"])
def test_prepare_keeps_the_bytes_of_a_trellis(name):
    code = get_code(name)
    words = [torch.randint(0, 256, (2, *code.words_shape(*size)), dtype=torch.uint8) for size in ((64, 96), (96, 32))]
    steps = [torch.rand(2, rows, columns // 32).bfloat16() for rows, columns in ((64, 96), (96, 32))]
    dense = [torch.empty(0, *size, dtype=torch.bfloat16) for size in ((64, 96), (96, 32))]
    weights = ExpertWeights(*(tensor.clone() for tensor in (*words, *dense)), None, name, *steps)
    cuda.prepare(weights)
    expected = cuda.blocks(cuda.kernel_words(cuda.tile(code.unpack(words[0][1]), True), code))
    assert torch.equal(weights.w13_pairs[1].flatten(), expected) and weights.w2_pairs.shape == words[1].shape


def test_steps_come_in_the_order_of_the_strips():
    steps = torch.arange(64 * 3, dtype=torch.int32).view(64, 3)
    assert cuda.tile_steps(steps, False)[2, 1, 5, 1] == steps[16 + 5 + 8, 2]
    assert cuda.tile_steps(steps, True)[0, 3, 2, 1] == steps[32 + 3 * 8 + 2, 0]


def test_prepare_keeps_shapes_and_content():
    torch.manual_seed(0)
    words = [torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16) for shape in ((2, 64, 32), (2, 32, 32))]
    dense = [torch.randn(shape).bfloat16() for shape in ((1, 64, 32), (1, 32, 32))]
    weights = ExpertWeights(*(tensor.clone() for tensor in (*words, *dense)), expert_map=None, code="mask16")
    pointers = [tensor.data_ptr() for tensor in (weights.w13_pairs, weights.w2_dense)]
    cuda.prepare(weights)
    assert pointers == [tensor.data_ptr() for tensor in (weights.w13_pairs, weights.w2_dense)]
    restored = cuda.kernel_words(weights.w13_pairs, get_code("mask16"))
    assert torch.equal(restored.flatten().sort().values, words[0].flatten().sort().values)
    assert torch.equal(weights.w2_dense[0].flatten(), cuda.blocks(cuda.tile(dense[1][0], False)))


def test_dispatch_table_is_ordered_and_open_ended():
    for capability, code in itertools.product((80, 86, 89, 90, 100), CODES.values()):
        rows = cuda._dispatch_rows(capability, cuda.kind_of(code))
        assert [limit for limit, _ in rows] == sorted(limit for limit, _ in rows)
        assert cuda.choose_kernel(1e9, capability, code) == rows[-1][1]
        assert cuda.choose_kernel(0.01, capability, code) == rows[0][1]


@pytest.mark.parametrize("tokens, pieces", [(0, [0]), (100, [100]), (257, [100, 100, 57])])
def test_long_batches_are_several_calls(tokens, pieces, monkeypatch):
    called = []

    def call(x, topk_weights, topk_ids, out, weights, kernel):
        assert len(x) == len(topk_weights) == len(topk_ids)
        called.append(len(x))
        out.copy_(x * topk_weights * topk_ids)

    monkeypatch.setattr(cuda, "_call", call)
    monkeypatch.setattr(cuda, "CALL_TOKENS", 100)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    x, topk_weights, topk_ids = torch.randn(tokens, 16).bfloat16(), torch.rand(tokens, 1), torch.ones(tokens, 1)
    out = cuda.fused_experts(x, topk_weights, topk_ids, None)
    assert called == pieces and torch.equal(out, (x * topk_weights * topk_ids).bfloat16())
