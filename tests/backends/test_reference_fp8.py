"""How the reference of products in e4m3 quantises rows, which the kernels are held to."""

from __future__ import annotations

import pytest
import torch

from puzzlemoe_vllm.backends.reference_fp8 import LARGEST, SMALLEST, quantised


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_every_size_are_quantised_or_zero(dtype):
    sizes = 2.0 ** torch.arange(-133, 127, dtype=torch.float64)
    rows = (torch.rand(len(sizes), 64, dtype=torch.float64) * 2 - 1) * sizes[:, None]
    rows = rows.bfloat16().to(dtype)
    largest = rows.abs().amax(dim=1)
    assert (largest > 0).sum() > 250
    kept = largest >= SMALLEST
    out = quantised(rows)
    assert not out[~kept].any()
    half_a_place = 16 / LARGEST  # of the largest magnitudes
    assert ((out - rows)[kept].abs() <= 1.001 * half_a_place * largest[kept, None]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_nan(value):
    rows = torch.ones(2, 32, dtype=torch.float64)
    rows[1, 3] = value
    out = quantised(rows)
    torch.testing.assert_close(out[0], rows[0])
    assert out[1].isnan().all()
