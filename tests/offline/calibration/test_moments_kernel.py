"""The kernel's moments against float64: compiled where a GPU is, else under Triton's interpreter."""

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
    from puzzlemoe_offline.calibration import moments_kernel as kernel

    pointers = {"moments": "*fp32", "rows": "*bf16", "starts": "*i32"}
    types = pointers | dict.fromkeys(("columns", "first", "every"), "i32")
    constants = {"BLOCK": kernel.BLOCK, "TOKENS": kernel.TOKENS}
    assert machine_code(
        kernel.add_moments_kernel, types, constants, capability, num_warps=kernel.WARPS, num_stages=kernel.STAGES
    )


@runs
@pytest.mark.parametrize(("columns", "counts"), [(128, [70, 0, 64, 1]), (144, [3, 200]), (272, [65, 5, 129])])
@pytest.mark.parametrize("every", [1, 2])
def test_moments_are_exact_to_float32(columns, counts, every):
    """Those of every second expert too, as when two GPUs share them."""
    from puzzlemoe_offline.calibration.moments_kernel import add_moments

    torch.manual_seed(columns)
    before = torch.randn(len(counts), columns, columns)
    before = before + before.mT
    batches = [torch.randn(sum(counts), columns).bfloat16() for _ in range(2)]
    starts = torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)
    for first in range(every):
        found = torch.stack([before[expert] for expert in range(first, len(counts), every)]).to(DEVICE)
        for rows in batches:
            add_moments(found, rows.to(DEVICE), starts, first, every)
        assert torch.equal(found, found.mT)
        for expert, its in zip(range(first, len(counts), every), found, strict=True):
            exact = before[expert].double()
            for rows in batches:
                own = rows.split(counts)[expert].double()
                exact = exact + own.T @ own
            assert (its.cpu().double() - exact).norm() <= 1e-6 * exact.norm()
