"""The fits' kernels against the fits in torch: compiled where a GPU is, else under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from support.triton_device import (
    DEVICE,
    compiles,
    machine_code,
    on_a_gpu,
    run_interpreted,
    runs,
    starts_the_interpreter,
)
from torch import Tensor

from puzzlemoe_offline.calibration.statistics import ProjectionInputs
from puzzlemoe_offline.words import compensate
from puzzlemoe_offline.words.column_coders import ColumnsInKernel
from puzzlemoe_offline.words.factors import inverse_factors
from puzzlemoe_offline.words.nearest import STEP_MULTIPLES, PackedMatrix, fit_table, stored_steps
from puzzlemoe_vllm.format.codes import CODES, TableCode, UnencodableWeight, get_code

pytest.importorskip("triton")
TABLE_CODES = [name for name, code in CODES.items() if isinstance(code, TableCode)]


@starts_the_interpreter
def test_under_the_interpreter():
    run_interpreted(__file__)


@compiles
@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile(capability):
    from puzzlemoe_offline.words import nearest_kernels as fit_kernels

    pointers = {"words": "*u8", "words_out": "*u8", "weights0": "*bf16", "weights1": "*bf16"}
    numbers = {"rows": "i32", "columns": "i32", "row_stride": "i32", "column_stride": "i32", "expert_stride": "i32"}
    constants = fit_kernels._constants(get_code("angle8"), STEP_MULTIPLES, 128) | {"BLOCK": 128, "SLOTS": 64}
    constants.pop("unit_step")
    for kernel, (rows, warps) in (
        (fit_kernels.fit_groups_kernel, fit_kernels.GROUPS_SHAPE),
        (fit_kernels.code_columns_kernel, fit_kernels.COLUMNS_SHAPE),
    ):
        types = dict.fromkeys(kernel.arg_names, "*fp32") | pointers | numbers | {"unit_step": "fp32"}
        assert machine_code(kernel, types, constants | {"ROWS": rows}, capability, num_warps=warps)


def random_weights(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Of different sizes, some of them zero and minus zero."""
    weights = torch.randn(rows, columns).bfloat16(), 3 * torch.randn(rows, columns).bfloat16()
    for weight in weights:
        weight[torch.rand(rows, columns) < 0.05] = 0.0
        weight[torch.rand(rows, columns) < 0.05] = -0.0
    weights[0][1], weights[1][1] = 0.0, 0.0
    return weights


def assert_same(found: PackedMatrix, expected: PackedMatrix) -> None:
    """But for roundings: near ties between words or steps may fall to the other side."""
    assert found.words.dtype == expected.words.dtype and found.steps.dtype == expected.steps.dtype
    assert found.words.shape == expected.words.shape
    close = torch.isclose(found.steps.cpu().float(), expected.steps.float(), rtol=2.0**-6)
    assert close.float().mean() > 0.99
    assert (found.words.cpu() == expected.words).float().mean() > 0.99


@runs
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("name", TABLE_CODES)
def test_groups(name, group):
    from puzzlemoe_offline.words.nearest_kernels import fit_groups

    torch.manual_seed(group)
    code = get_code(name)
    weights, importance = random_weights(19, 128), (torch.rand(128) + 0.1, torch.rand(128) + 0.1)
    words, steps = fit_groups(
        code, tuple(w.to(DEVICE) for w in weights), tuple(s.to(DEVICE) for s in importance), group, STEP_MULTIPLES
    )
    assert_same(PackedMatrix(code.pack(words), steps.bfloat16()), fit_table(code, weights, importance, group))


@runs
@pytest.mark.parametrize("size", [1e20, 3e38])
def test_steps_of_weights_beyond_float32_are_refused(size):
    from puzzlemoe_offline.words.nearest_kernels import fit_groups

    weights = tuple((weight.float().sign() * size).bfloat16() for weight in random_weights(16, 64))
    importance = torch.ones(64, device=DEVICE)
    _, steps = fit_groups(
        get_code("angle8"), tuple(w.to(DEVICE) for w in weights), (importance, importance), 64, STEP_MULTIPLES
    )
    with pytest.raises(UnencodableWeight, match="a step is NaN, infinite or above"):
        stored_steps(steps)


@runs
def test_weights_with_other_strides():
    from puzzlemoe_offline.words.nearest_kernels import fit_groups

    torch.manual_seed(17)
    code = get_code("angle6")
    weights, importance = random_weights(64, 17), (torch.rand(64) + 0.1, torch.rand(64) + 0.1)
    columns = tuple(weight.to(DEVICE).T for weight in weights)
    words, steps = fit_groups(code, columns, tuple(s.to(DEVICE) for s in importance), 64, STEP_MULTIPLES)
    expected = fit_table(code, tuple(weight.T for weight in weights), importance, 64)
    assert_same(PackedMatrix(code.pack(words), steps.bfloat16()), expected)


@runs
@pytest.mark.parametrize(("name", "group", "columns"), [("angle8", 128, 128), ("angle6", 32, 160), ("mask6", 64, 64)])
def test_compensation(name, group, columns, monkeypatch):
    torch.manual_seed(columns)
    code, weights = get_code(name), random_weights(18, columns)
    seen = []
    for tokens in (600, 200):
        x = torch.randn(tokens, columns // 4) @ torch.randn(columns // 4, columns) + torch.randn(tokens, columns)
        seen.append(ProjectionInputs(x.norm(dim=0), tokens, x.T @ x))
    (expected,) = compensate.fit_compensated(code, [weights], inverse_factors(seen), group)
    monkeypatch.setattr(compensate, "coder_of", lambda code, group, *_: ColumnsInKernel(code, group))
    moved = tuple(ProjectionInputs(s.norms.to(DEVICE), s.tokens, s.moments.to(DEVICE)) for s in seen)
    other = tuple(w.flip(0) for w in weights)
    pairs = [tuple(w.to(DEVICE) for w in pair) for pair in (weights, other)]
    factors = inverse_factors([*moved, *moved])
    found, turned = compensate.fit_compensated(code, pairs, factors, group)
    assert torch.equal(turned.words.flip(0), found.words) and torch.equal(turned.steps.flip(0), found.steps)
    # After a near tie a row goes on differently, but as well.
    rows = (found.words.cpu() == expected.words).all(dim=1) & (found.steps.cpu() == expected.steps).all(dim=1)
    assert rows.float().mean() > 0.8
    for position, (weight, inputs) in enumerate(zip(weights, seen, strict=True)):
        lost = []
        for packed in (found, expected):
            difference = weight.float() - code.decode(packed.words, position, packed.steps).cpu().float()
            lost.append(float(((difference @ inputs.moments) * difference).sum()))
        assert lost[0] == pytest.approx(lost[1], rel=0.02)


@runs
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_no_word_holds_is_refused(value, monkeypatch):
    monkeypatch.setattr(compensate, "coder_of", lambda code, group, *_: ColumnsInKernel(code, group))
    weights = tuple(torch.randn(4, 32, device=DEVICE).bfloat16() for _ in (0, 1))
    weights[1][2, 3] = value
    seen = (ProjectionInputs(torch.ones(32, device=DEVICE), 1, torch.eye(32, device=DEVICE)),) * 2
    with pytest.raises(UnencodableWeight, match="NaN or infinite"):
        compensate.fit_compensated(get_code("angle8"), [weights], inverse_factors([*seen]), 32)


@on_a_gpu
@pytest.mark.parametrize("name", TABLE_CODES)
def test_a_gpu_gets_them(name):
    torch.manual_seed(7)
    code, weights = get_code(name), random_weights(300, 1024)
    importance = torch.rand(1024) + 0.1, torch.rand(1024) + 0.1
    found = fit_table(code, tuple(w.cuda() for w in weights), tuple(s.cuda() for s in importance), 128)
    assert_same(found, fit_table(code, weights, importance, 128))
