"""Products of float32 by bf16 parts, against float64."""

from collections.abc import Callable

import pytest
import torch
from support.triton_device import on_a_gpu
from torch import Tensor

from puzzlemoe_offline.calibration.statistics import ProjectionInputs
from puzzlemoe_offline.words import factors, split_product
from puzzlemoe_offline.words.split_product import product, times_upper, times_upper_transposed, upper_times


def split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of a matrix [M, K]."""
    first, again, rest = split_product._left_parts(matrix[None], matrix.shape[1])[0].chunk(3, dim=1)
    assert torch.equal(first.nan_to_num(), again.nan_to_num())
    return first, rest


def test_the_parts_hold_sixteen_bits():
    torch.manual_seed(1)
    values = torch.randn(10, 100) * torch.rand(10, 100).mul(80).sub(40).exp()
    first, rest = split(values)
    assert first.dtype == rest.dtype == torch.bfloat16
    assert ((values.double() - first.double() - rest.double()).abs() <= 2.0**-16 * values.double().abs()).all()


@pytest.mark.parametrize("size", [float("inf"), float("nan"), 3.4e38])
def test_what_bf16_cannot_hold_is_not_finite(size):
    first, rest = split(torch.tensor([[size]]))
    assert not (first.float() + rest.float()).isfinite().any()


def test_a_cpu_multiplies_in_float32():
    torch.manual_seed(2)
    left, right = torch.randn(2, 8, 24), torch.randn(2, 24, 24).triu()
    assert torch.equal(product(left, right), left @ right)
    assert torch.equal(times_upper(left, right), left @ right)
    assert torch.equal(times_upper_transposed(left, right), left @ right.mT)
    assert torch.equal(upper_times(right, left.mT), right @ left.mT)


def by_row(matrix: Tensor) -> Tensor:
    return matrix


def by_column(matrix: Tensor) -> Tensor:
    """The same values, columns one after another in memory."""
    return matrix.mT.contiguous().mT


def by_part(matrix: Tensor) -> Tensor:
    """The same values in a larger matrix."""
    larger = torch.full((matrix.shape[0], matrix.shape[1] + 3, matrix.shape[2] + 5), float("nan"), device=matrix.device)
    larger[:, 3:, :-5] = matrix
    return larger[:, 3:, :-5]


MEMORY = pytest.mark.parametrize("memory", [by_row, by_column, by_part])


def check_products(left: Tensor, upper: Tensor, memory: Callable[[Tensor], Tensor], allowed: float) -> None:
    """All four products, against float64."""
    exact_left, exact = left.double(), upper.double()
    left, right, tall = memory(left), memory(upper), memory(left.mT.contiguous())
    for found, expected, size in (
        (product(left, right), exact_left @ exact, exact_left.abs() @ exact.abs()),
        (times_upper(left, right), exact_left @ exact, exact_left.abs() @ exact.abs()),
        (times_upper_transposed(left, right), exact_left @ exact.mT, exact_left.abs() @ exact.abs().mT),
        (upper_times(right, tall), exact @ exact_left.mT, exact.abs() @ exact_left.abs().mT),
    ):
        assert found.dtype == torch.float32 and found.shape == expected.shape
        assert ((found - expected).abs() <= allowed * size).all()


@MEMORY
@pytest.mark.parametrize("columns", [1, 6, 7, 12, 23])
def test_products_by_parts_and_blocks(columns, memory, monkeypatch):
    """As on a GPU, but for the product of parts itself."""
    torch.manual_seed(6)
    monkeypatch.setattr(split_product, "BLOCK", 6)
    monkeypatch.setattr(split_product, "_stays", lambda left, right: False)
    monkeypatch.setattr(split_product, "_multiplied", lambda parts, others: parts.float() @ others.float())
    check_products(torch.randn(2, 9, columns), torch.randn(2, columns, columns).triu(), memory, 2.0**-15)


@on_a_gpu
@MEMORY
@pytest.mark.parametrize("columns", [3584, 5000])
def test_a_gpu_multiplies_by_triangular_factors(columns, memory):
    torch.manual_seed(7)
    left = torch.randn(1, 1024, columns, device="cuda")
    upper = torch.randn(1, columns, columns, device="cuda").triu() * torch.rand(columns, device="cuda").mul(8).exp()
    check_products(left, upper, memory, 2.0**-15 + 3 * columns / 16 * 2.0**-24)


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
        (first, its_rest), (second, other_rest) = (map(Tensor.float, split(each)) for each in (left, right))
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
