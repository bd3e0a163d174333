"""The kernel that multiplies rows by the router's weights gives what torch gives: compiled where a GPU is, else under
Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from support.triton_device import DEVICE, compiles, machine_code, run_interpreted, runs, starts_the_interpreter

pytest.importorskip("triton")


@starts_the_interpreter
def test_under_the_interpreter():
    run_interpreted(__file__)


@compiles
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles(capability):
    from puzzlemoe_offline.calibration.weighted_rows import BLOCK, weighted_rows_kernel

    types = {"rows": "*bf16", "weights": "*fp32", "out": "*bf16", "columns": "i32"}
    assert machine_code(weighted_rows_kernel, types, {"BLOCK": BLOCK}, capability)


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("count", "columns"), [(0, 64), (1, 1), (3, 4095), (5, 4096), (2, 4097), (7, 768)])
def test_it_is_the_product(count, columns, dtype):
    from puzzlemoe_offline.calibration.weighted_rows import weighted_rows

    rows = torch.randn(columns, count).to(dtype).T
    weights = torch.rand(2 * count)[::2]
    if count > 1:
        rows[0, 0], rows[1, 0], weights[1] = torch.inf, torch.nan, 0.0
    expected = torch.mul(rows, weights[:, None], out=torch.empty_like(rows))
    found = weighted_rows(rows.to(DEVICE), weights.to(DEVICE)).cpu()
    assert found.dtype == dtype
    # The interpreter cuts off what bf16 does not hold, where a GPU rounds.
    cut = dtype == torch.bfloat16 and DEVICE == "cpu"
    torch.testing.assert_close(found, expected, rtol=2**-7 if cut else 0, atol=0, equal_nan=True)
