"""The encoder of trellis codes: against all paths of a tiny trellis, and by its errors on normal weights."""

import itertools

import pytest
import torch
from torch import Tensor

from puzzlemoe_offline.words import trellis
from puzzlemoe_offline.words.trellis import _trellis, encode
from puzzlemoe_vllm.format.codes import Decoder, TrellisCode, get_code
from puzzlemoe_vllm.format.codes.trellis import places_of, values

TINY = TrellisCode(1, Decoder.TRELLIS3, unit_step=1.0)
"""States of five bits."""


def cost(states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted squared error of paths of states [..., places]."""
    value = torch.stack(values(states), dim=-1)
    return (weights * (value - targets).square()).sum(dim=(-1, -2))


def every_path(start: int, places: int) -> Tensor:
    """int64 [2^places, places], the states of `TINY` after a state, for every sequence of words."""
    paths = []
    for words in itertools.product((0, 1), repeat=places):
        state, path = start, []
        for word in words:
            state = word << 4 | state >> 1
            path.append(state)
        paths.append(path)
    return torch.tensor(paths)


def random_tiles(tiles: int, places: int, spread: float = 20.0) -> tuple[Tensor, Tensor]:
    return torch.randn(tiles, places, 2) * spread, torch.rand(tiles, places, 2) + 0.01


@pytest.mark.parametrize("seed", range(4))
def test_the_path_between_free_ends_is_the_best_of_all(seed):
    torch.manual_seed(seed)
    targets, weights = random_tiles(3, 6)
    found = _trellis(TINY, targets.device).path(targets, weights)
    paths = torch.cat([every_path(start, 6) for start in range(0, 32, 2)])
    for tile in range(3):
        best = cost(paths, targets[tile], weights[tile]).min()
        torch.testing.assert_close(cost(found[tile], targets[tile], weights[tile]), best)
        assert (paths == found[tile]).all(dim=1).any()


@pytest.mark.parametrize("seed", range(4))
def test_the_path_round_is_the_best_of_those_through_the_seam(seed):
    torch.manual_seed(seed)
    targets, weights = random_tiles(3, 9)
    seam = torch.randint(0, 32, (3,))
    found = _trellis(TINY, targets.device).path(targets, weights, seam)
    for tile in range(3):
        paths = every_path(int(seam[tile]), 9)
        round_ = paths[paths[:, -1] == seam[tile]]
        best = cost(round_, targets[tile], weights[tile]).min()
        torch.testing.assert_close(cost(found[tile], targets[tile], weights[tile]), best)
        assert (round_ == found[tile]).all(dim=1).any()


def decoded(code: TrellisCode, words: Tensor) -> Tensor:
    """The values [tiles, 256, 2] of stored words of tiles."""
    return torch.stack(values(places_of(code.states(words.flatten()[None]))[0]), dim=-1)


@pytest.mark.parametrize(
    ("name", "most"),
    [("trellis8", 0.0055), ("trellis6", 0.0190), ("trellis5", 0.0370), ("trellis4", 0.0710), ("trellis3", 0.1420)],
)
def test_error_for_normal_weights(name, most):
    torch.manual_seed(0)
    code = get_code(name)
    pairs = torch.randn(16, 256, 2)
    words = encode(code, pairs / code.unit_step, torch.ones_like(pairs))
    assert words.shape == (16, 32 * code.bits) and words.dtype == torch.uint8
    error = (decoded(code, words) * code.unit_step - pairs).square().sum() / pairs.square().sum()
    assert 2.0**-code.bits < error < most


def test_bits_go_where_weights_are():
    torch.manual_seed(1)
    code = get_code("trellis4")
    pairs = torch.randn(4, 256, 2)
    weights = torch.ones_like(pairs)
    weights[..., 1] = 0.1
    error = (decoded(code, encode(code, pairs / code.unit_step, weights)) * code.unit_step - pairs).square()
    assert error[..., 0].mean() < 0.05 < 0.1 < error[..., 1].mean()


def test_tiles_do_not_touch_each_other():
    torch.manual_seed(2)
    code = get_code("trellis3")
    targets, weights = random_tiles(5, 256)
    together = encode(code, targets, weights)
    assert torch.equal(together[3:4], encode(code, targets[3:4], weights[3:4]))


def test_weights_of_zero_and_far_targets():
    code = get_code("trellis8")
    targets = torch.full((1, 256, 2), 2.0**14)
    words = encode(code, targets, torch.zeros_like(targets))
    assert words.shape == (1, 256)
    far = decoded(code, encode(code, targets, torch.ones_like(targets)))
    assert far.mean() > 20


def test_without_a_compiler_the_words_are_the_same(monkeypatch, caplog):
    code, (targets, weights) = get_code("trellis5"), random_tiles(3, 256)
    compiled = encode(code, targets, weights)

    def no_compiler(function, dynamic):
        def call(*tensors):
            raise RuntimeError("No working C++ compiler found\nand more")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(trellis, "_trellis", _trellis.__wrapped__)
    assert torch.equal(encode(code, targets, weights), compiled)
    assert any("g++" in said and said.endswith("No working C++ compiler found") for said in caplog.messages)
