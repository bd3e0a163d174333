"""Products of float32 by bf16 parts, against float64."""

from collections.abc import Callable

import pytest
import torch
from support.triton_device import on_a_gpu
from torch import Tensor

from puzzlemoe_offline.calibration.statistics import ProjectionInputs
from puzzlemoe_offline.words import factors
from puzzlemoe_offline.words.split_product import _split, product


def test_the_parts_hold_sixteen_bits():
    torch.manual_seed(1)
    values = torch.randn(1000) * torch.rand(1000).mul(80).sub(40).exp()
    first, rest = _split(values)
    assert first.dtype == rest.dtype == torch.bfloat16
    assert ((values.double() - first.double() - rest.double()).abs() <= 2.0**-16 * values.double().abs()).all()


@pytest.mark.parametrize("size", [float("inf"), float("nan"), 3.4e38])
def test_what_bf16_cannot_hold_is_not_finite(size):
    first, rest = _split(torch.tensor([size]))
    assert not (first.float() + rest.float()).isfinite().any()


def test_a_cpu_multiplies_in_float32():
    torch.manual_seed(2)
    left, right = torch.randn(2, 8, 24), torch.randn(2, 24, 16)
    assert torch.equal(product(left, right), left @ right)


def test_targets_need_the_second_part():
    """Of moments a few directions of which carry most, what an output lacks times their inverse, by factors."""
    torch.manual_seed(5)
    columns = 512
    directions = torch.linalg.qr(torch.randn(columns, columns)).Q
    x = torch.randn(2000, columns) * torch.arange(1, columns + 1) ** -0.8 @ directions
    seen = ProjectionInputs(x.norm(dim=0), len(x), x.T @ x)
    factor = factors.inverse_factors([seen])[0].double()
    moments = torch.linalg.inv(factor.T @ factor)
    lacking = torch.randn(64, columns).double() @ moments
    exact = lacking @ factor.T @ factor

    def error(times: Callable[[Tensor, Tensor], Tensor]) -> float:
        difference = times(times(lacking.float(), factor.float().T), factor.float()).double() - exact
        squares = [((each @ moments) * each).sum() for each in (difference, exact)]
        return float(squares[0] / squares[1]) ** 0.5

    def by_parts(left: Tensor, right: Tensor) -> Tensor:
        (first, its_rest), (second, other_rest) = (map(Tensor.float, _split(each)) for each in (left, right))
        return first @ second + first @ other_rest + its_rest @ second

    assert error(by_parts) < 2e-3
    assert error(lambda left, right: left.bfloat16().float() @ right.bfloat16().float()) > 0.02


@on_a_gpu
@pytest.mark.parametrize("shape", [(1, 4096, 14336, 14336), (2, 3584, 512, 4096), (1, 300, 700, 20000)])
def test_a_gpu_loses_no_more_than_the_parts(shape):
    torch.manual_seed(3)
    count, rows, inner, columns = shape
    # Of very different sizes, as moments' factors are.
    left = torch.randn(count, rows, inner, device="cuda") * torch.rand(inner, device="cuda").mul(8).exp()
    right = torch.randn(count, columns, inner, device="cuda").mT
    found, exact = product(left, right), left.double() @ right.double()
    assert found.dtype == torch.float32
    # The parts' last bits, and one of 24 that is cut off whenever 16 terms of three products were added.
    allowed = 2.0**-15 + 3 * inner / 16 * 2.0**-24
    assert ((found - exact).abs() / (left.abs().double() @ right.abs().double())).max() < allowed
    assert (found - exact).norm() < allowed * exact.norm()


@on_a_gpu
def test_a_gpu_inverts_moments_of_many_columns():
    torch.manual_seed(4)
    columns = 2 * factors.FACTORED_TOGETHER + 64
    directions = torch.randn(64, columns, device="cuda") * torch.arange(1, 65, device="cuda")[:, None]
    x = torch.randn(3000, 64, device="cuda") @ directions + torch.randn(3000, columns, device="cuda")
    seen = ProjectionInputs(x.norm(dim=0), len(x), x.T @ x)
    (factor,) = factors.inverse_factors([seen])
    moments = seen.moments.double() / len(x) ** factors.BALANCE
    moments.diagonal().add_(factors.DAMPING * moments.diagonal().mean())
    error = factor.double() @ moments @ factor.double().T - torch.eye(columns, device="cuda")
    assert not factor.tril(-1).any()
    assert error.abs().max() < 1e-3
