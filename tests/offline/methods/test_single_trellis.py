"""Trellis words of single experts: the pair's quantiser and compensation, with both weights from one matrix."""

from __future__ import annotations

import pytest
import torch
from support.model_configs import VOCABULARY
from support.models import build
from support.runs import run_method
from torch import Tensor
from transformers import AutoModelForCausalLM

from puzzlemoe_offline.calibration.statistics import ProjectionInputs
from puzzlemoe_offline.calibration.text import Calibration
from puzzlemoe_offline.methods import BASELINES
from puzzlemoe_offline.methods.base import MethodError
from puzzlemoe_offline.methods.single_trellis import SingleTrellis, single_words
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.words.compensate import fit_compensated, fit_neighbours
from puzzlemoe_offline.words.factors import inverse_factors
from puzzlemoe_offline.words.neurons import facing_order
from puzzlemoe_vllm.format.codes import get_code

TOKENS = torch.randint(0, VOCABULARY - 1, (16, 64), generator=torch.Generator().manual_seed(0))
CALIBRATION = Calibration(TOKENS, "random tokens")


def factor_of(x: Tensor) -> Tensor:
    """[1, K, K]."""
    return inverse_factors([ProjectionInputs(x.norm(dim=0), len(x), x.T @ x)])


def correlated(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns // 4) @ torch.randn(columns // 4, columns) + torch.randn(tokens, columns)


def relative(weight: Tensor, value: Tensor) -> float:
    """||W - V||^2 / ||W||^2."""
    return float((weight.float() - value.float()).square().sum() / weight.float().square().sum())


def test_a_matrix_whose_neighbours_do_not_correlate_is_coded_as_a_pair():
    """Two experts' columns by turns, with factors and steps as theirs: more than a block of them, and several tiles."""
    torch.manual_seed(0)
    code, pair = get_code("trellis4"), (torch.randn(16, 160).bfloat16(), 1.2 * torch.randn(16, 160).bfloat16())
    factors = torch.cat([factor_of(correlated(400, 160)), factor_of(5 * correlated(90, 160))])
    rows = torch.rand(1, 16) + 0.5
    (together,) = fit_compensated(code, [pair], factors, 32, rows[..., None].expand(-1, -1, 2))
    alone = torch.zeros(1, 320, 320)
    alone[0, ::2, ::2], alone[0, 1::2, 1::2] = factors
    (single,) = fit_neighbours(code, [torch.stack(pair, dim=2).flatten(1)], alone, 32, rows)
    assert torch.equal(single.words, together.words) and torch.equal(single.steps, together.steps)


@pytest.mark.parametrize("name", ["trellis8", "trellis6", "trellis4"])
def test_without_compensation_the_error_is_the_pairs(name):
    torch.manual_seed(1)
    code, weight, pair = get_code(name), torch.randn(16, 512).bfloat16(), torch.randn(2, 16, 256).bfloat16()
    (words,) = fit_compensated(code, [tuple(pair)], torch.eye(256).expand(2, -1, -1), 128)
    decoded = torch.stack([code.decode(words.words, position, words.steps) for position in (0, 1)])
    (single,) = single_words(code, [weight], torch.eye(512)[None], torch.ones(1, 16))
    assert relative(weight, single) == pytest.approx(relative(pair, decoded), rel=0.05)


@pytest.mark.parametrize("name", ["trellis6", "trellis4"])
def test_compensation_lowers_the_error_of_the_output(name):
    torch.manual_seed(2)
    code, weight, x = get_code(name), torch.randn(16, 256).bfloat16(), correlated(1500, 256)

    def error(factors: Tensor) -> float:
        (value,) = single_words(code, [weight], factors, torch.ones(1, 16))
        return relative(x @ weight.float().T, x @ value.float().T)

    diagonal = ProjectionInputs(x.norm(dim=0), len(x), x.square().sum(dim=0).diag())
    assert error(factor_of(x)) < 0.8 * error(inverse_factors([diagonal]))


def test_matrices_at_once_are_those_of_each_alone():
    torch.manual_seed(3)
    code, weights = get_code("trellis3"), list(torch.randn(3, 16, 128).bfloat16())
    factors, rows = torch.cat([factor_of(correlated(300, 128)) for _ in weights]), torch.rand(3, 16) + 0.1
    together = single_words(code, weights, factors, rows)
    for number, weight in enumerate(weights):
        here = slice(number, number + 1)
        assert torch.equal(single_words(code, [weight], factors[here], rows[here])[0], together[number])


def test_the_strongest_neuron_stands_beside_the_weakest():
    assert facing_order(torch.tensor([3.0, 9.0, 1.0, 5.0, 2.0, 7.0])).tolist() == [1, 2, 5, 4, 3, 0]


def logits(folder: object) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS[:2]).logits


def test_what_is_written_is_the_model_with_its_neurons_in_another_order(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_local_experts": 2}
    source = build("mixtral", tmp_path / "source", **sizes)
    method = BASELINES["trellis8-single"]
    assert method == SingleTrellis(8)
    run_method(source, tmp_path / "out", method, CALIBRATION)
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    # Gate and up have 32 words in a row, down 64.
    assert method.bits_per_weight(before) == pytest.approx(4 + 8 * (2 / 32 + 1 / 64) / 3)
    assert after.quantization is None and after.names == before.names
    for number in (0, 1):
        expert, written = before.expert(0, number), after.expert(0, number)
        order = torch.cdist(expert.gate.float(), written.gate.float()).argmin(dim=0)
        assert order.sort().values.equal(torch.arange(128)) and not order.equal(torch.arange(128))
        pairs = zip(expert.matrices, (written.gate, written.up, written.down.T), strict=True)
        for projection, (matrix, found) in enumerate(pairs):
            reordered = (matrix.T if projection == 2 else matrix)[order]
            assert 0.001 < relative(reordered, found) < 0.012
    dense = logits(source)
    assert 0.001 < relative(dense, logits(tmp_path / "out")) < 0.02


def test_a_model_without_whole_tiles_is_refused_before_anything_is_written(tmp_path):
    source = build("mixtral", tmp_path / "source")
    with pytest.raises(MethodError, match="hidden size 128 and intermediate size 96 are not multiples of 64, the") as e:
        run_method(source, tmp_path / "out", SingleTrellis(4), CALIBRATION)
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()
