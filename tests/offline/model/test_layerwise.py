"""A layer's experts in grouped products, as a GPU runs them, give what one expert after another gives."""

import pytest
import torch
from support.triton_device import DEVICE

from puzzlemoe_offline.calibration import statistics
from puzzlemoe_offline.calibration.statistics import ExpertStatistics
from puzzlemoe_offline.model.expert import Expert, StackedExperts
from puzzlemoe_offline.model.layerwise import StreamedExperts

HIDDEN, INNER = 64, 96


class Experts:
    """Random ones, handed out as `LayerExperts` does."""

    def __init__(self, count: int):
        shapes = (count, INNER, HIDDEN), (count, INNER, HIDDEN), (count, HIDDEN, INNER)
        self.all = StackedExperts(*(torch.randn(shape).bfloat16().to(DEVICE) / 8 for shape in shapes))

    def __call__(self, layer: int, number: int) -> Expert:
        return self.all[number]

    def stacked(self, layer: int) -> StackedExperts:
        return self.all


@pytest.mark.parametrize(("count", "choices", "tokens"), [(8, 2, 50), (60, 4, 33), (5, 5, 1)])
def test_grouped_products_are_those_of_the_experts(count, choices, tokens):
    torch.manual_seed(tokens)
    experts = Experts(count)
    inputs = torch.randn(tokens, HIDDEN).bfloat16().to(DEVICE)
    # The last expert is chosen by no token, where there are enough others.
    others = count - 1 if count > choices else count
    weights, ids = torch.rand(tokens, others, device=DEVICE).topk(choices)
    outputs, gathered = [], []
    for run in ("_grouped", "_one_by_one"):
        module = StreamedExperts(experts, 0)
        seen = ExpertStatistics.zeros(count, HIDDEN, INNER, torch.device(DEVICE), moments=True)
        by_router = ExpertStatistics.zeros(count, HIDDEN, INNER, torch.device(DEVICE), moments=True, by_router=True)

        def observe(*batch, seen=seen, by_router=by_router):
            seen.observe(*batch)
            by_router.observe(*batch)

        module.observe = observe
        outputs.append(getattr(module, run)(inputs, ids, weights.bfloat16()))
        gathered.append(seen)
        for expert in range(count):
            chosen_by, choice = (ids == expert).nonzero(as_tuple=True)
            rows = inputs[chosen_by].double() * weights.bfloat16()[chosen_by, choice, None].double()
            moments, squares = by_router.input_moments[expert].double(), by_router.input_squares[expert]
            assert (moments - rows.T @ rows).norm() <= 0.01 * (rows.T @ rows).norm()
            assert (squares - rows.square().sum(dim=0)).norm() <= 0.01 * squares.norm()
    exact = torch.zeros(tokens, HIDDEN, dtype=torch.float64, device=DEVICE)
    for token in range(tokens):
        for choice in range(choices):
            gate, up, down = (matrix.double() for matrix in experts.all[int(ids[token, choice])].matrices)
            hidden = torch.nn.functional.silu(gate @ inputs[token].double()) * (up @ inputs[token].double())
            exact[token] += float(weights[token, choice].bfloat16()) * (down @ hidden)
    for output in outputs:
        assert (output.double() - exact).norm() < 0.01 * exact.norm()
    grouped, single = gathered
    assert grouped.tokens.tolist() == single.tokens.tolist() == ids.flatten().bincount(minlength=count).tolist()
    for name in ("input_squares", "hidden_squares"):
        torch.testing.assert_close(getattr(grouped, name), getattr(single, name), rtol=0.05, atol=1e-2)
    for one, other in zip(grouped.input_moments, single.input_moments, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_moments_are_exact_to_float32():
    torch.manual_seed(0)
    rows = [torch.randn(tokens, HIDDEN).bfloat16().to(DEVICE) for tokens in (700, 0, 900)]
    seen = ExpertStatistics.zeros(3, HIDDEN, HIDDEN, torch.device(DEVICE), moments=True)
    for _ in range(3):
        together = torch.cat(rows)
        ones = torch.ones(len(together), device=DEVICE)
        seen.observe(0, [len(its) for its in rows], together, together, ones)
    for expert, its in enumerate(rows):
        exact = 3 * its.double().T @ its.double()
        assert (seen.input_moments[expert].double() - exact).norm() <= 1e-5 * exact.norm()
        assert (seen.hidden_squares[expert] - exact.diagonal()).abs().max() <= 1e-5 * exact.norm()


def test_squares_of_experts_together_are_those_of_each():
    """Also of experts without rows."""
    torch.manual_seed(0)
    counts = [3, 0, 17, 1, 0, 40, 0]
    rows = torch.randn(sum(counts), HIDDEN).bfloat16().to(DEVICE)
    found = statistics.column_squares(rows, counts)
    expected = torch.stack([its.double().square().sum(dim=0) for its in rows.split(counts)])
    assert ((found - expected).abs() <= 1e-6 * expected).all() and not found[[1, 4, 6]].any()
    seen = ExpertStatistics.zeros(9, HIDDEN, HIDDEN, torch.device(DEVICE), moments=True)
    seen.observe(1, counts, rows, rows, torch.ones(len(rows), device=DEVICE))
    assert seen.tokens.tolist() == [0, *counts, 0]
    assert torch.equal(seen.input_squares[1:8], found.double()) and not seen.input_moments[[0, 2, 5, 7, 8]].any()
