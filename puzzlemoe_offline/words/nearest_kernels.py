"""The fits of codes with steps as Triton kernels, for a GPU.

They are those of nearest.py and column_coders.py but for roundings.  There a matrix of scores, of every candidate for
every pair of weights, goes through memory, and a column of compensation is a dozen operations; here both stay in
registers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from puzzlemoe_vllm.format.codes import TableCode

GROUPS_SHAPE = 8, 4
COLUMNS_SHAPE = 4, 1
"""Rows of the matrices and warps of one program of each kernel: the fastest on an H100."""


def fit_groups(
    code: TableCode,
    weights: tuple[Tensor, Tensor],
    importance: tuple[Tensor, Tensor],
    group: int,
    multiples: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """Words uint8 [N, K], one a column, and steps float32 [N, K / group] of two matrices [N, K] of equal strides.

    importance: float32 [K] twice; multiples: of the step that suits normal weights, to choose from.
    """
    rows, columns = weights[0].shape
    device = weights[0].device
    words = torch.empty(rows, columns, dtype=torch.uint8, device=device)
    steps = torch.empty(rows, columns // group, device=device)
    rows_each, warps = GROUPS_SHAPE
    assert weights[0].stride() == weights[1].stride()
    fit_groups_kernel[(triton.cdiv(rows, rows_each), columns // group)](
        *weights,
        *weights[0].stride(),
        importance[0].contiguous(),
        importance[1].contiguous(),
        *_tables(code, multiples, device),
        words,
        steps,
        rows,
        columns,
        ROWS=rows_each,
        num_warps=warps,
        **_constants(code, multiples, group),
    )
    return words, steps


def code_columns(
    code: TableCode, block: Tensor, importance: Tensor, factor: Tensor, group: int, multiples: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes the columns of a block of each of `pairs` pairs one after another, as `fit_compensated` does: words uint8
    [B, pairs * N], steps float32 [B / group, pairs * N] and errors float32 [2 * pairs, B, N], each over its column's
    diagonal element of the factor.

    block: [2 * pairs, B, N] with B up to 128, rows contiguous, left as it is; importance: weights of squared errors
    [2 * pairs, B]; factor: [2 * pairs, B, B].
    """
    experts, columns, rows = block.shape
    words = torch.empty(columns, experts // 2 * rows, dtype=torch.uint8, device=block.device)
    steps = torch.empty(columns // group, experts // 2 * rows, device=block.device)
    errors = torch.empty(experts, columns, rows, device=block.device)
    rows_each, warps = COLUMNS_SHAPE
    code_columns_kernel[(triton.cdiv(rows, rows_each), experts // 2)](
        block,
        *block.stride()[:2],
        importance.contiguous(),
        factor.contiguous(),
        *_tables(code, multiples, block.device),
        words,
        steps,
        errors,
        rows,
        columns,
        BLOCK=128,
        SLOTS=triton.next_power_of_2(len(code.magnitudes)),
        ROWS=rows_each,
        num_warps=warps,
        **_constants(code, multiples, group),
    )
    return words, steps, errors


@functools.cache
def _tables(code: TableCode, multiples: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The candidates [C, 2], their words [C, 2, 2] and the multiples, on a device."""
    return code.magnitudes.to(device), code.words.to(device), torch.tensor(multiples, device=device)


def _constants(code: TableCode, multiples: tuple[float, ...], group: int) -> dict[str, Any]:
    return {
        "unit_step": code.unit_step,
        "CANDIDATES": len(code.magnitudes),
        "MULTIPLES": len(multiples),
        "GROUP": group,
    }


@triton.jit
def round_to_bf16(value):
    """To the nearest bf16, ties to even, as float32."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def inverse(step):
    return 1.0 / tl.maximum(step, 1.1754943508222875e-38)


@triton.jit
def nearest(value0, value1, importance0, importance1, candidates, CANDIDATES: tl.constexpr):
    """Of absolute values over their step, the candidates with the least weighted error, and half that error less what
    does not depend on the candidate; all broadcast to one shape."""
    linear0, linear1 = importance0 * value0, importance1 * value1
    least = tl.zeros_like(linear0) + float("inf")
    index = tl.zeros_like(linear0).to(tl.int32)
    for candidate in range(CANDIDATES):
        level0, level1 = tl.load(candidates + 2 * candidate), tl.load(candidates + 2 * candidate + 1)
        constant = (importance0 * level0 * level0 + importance1 * level1 * level1) * 0.5
        score = constant - linear0 * level0 - linear1 * level1
        better = score < least
        least = tl.where(better, score, least)
        index = tl.where(better, candidate, index)
    return index, least


@triton.jit
def nearest_of_all(value0, value1, importance0, importance1, level0, level1, candidate, CANDIDATES: tl.constexpr):
    """The same of values [1, N] and numbers for importance, with the candidates' levels as [slots, 1]: one column alone
    would leave a thread to go through them all."""
    constant = (importance0 * level0 * level0 + importance1 * level1 * level1) * 0.5
    constant = tl.where(candidate < CANDIDATES, constant, float("inf"))
    score = constant - importance0 * value0 * level0 - importance1 * value1 * level1
    return tl.argmin(score, axis=0)[None, :]


@triton.jit
def fit_steps(
    value0, value1, importance0, importance1, candidates, multiples, unit_step,
    CANDIDATES: tl.constexpr, MULTIPLES: tl.constexpr,
):  # fmt: skip
    """Candidates [K, N] and steps [1, N] of absolute values [K, N].

    importance0, importance1: [K, 1], zero for other groups' columns.
    """
    energy = tl.sum(importance0 * value0 * value0 + importance1 * value1 * value1, axis=0)[None, :]
    typical = tl.sqrt(energy / tl.sum(importance0 + importance1, axis=0)[None, :]) * unit_step
    least = tl.zeros_like(energy) + float("inf")
    best = tl.zeros_like(value0).to(tl.int32)
    for multiple in range(MULTIPLES):
        step = typical * tl.load(multiples + multiple)
        over = inverse(step)
        tried, score = nearest(value0 * over, value1 * over, importance0, importance1, candidates, CANDIDATES)
        error = energy + 2.0 * step * step * tl.sum(score, axis=0)[None, :]
        better = error < least
        least = tl.where(better, error, least)
        best = tl.where(better, tried, best)
    level0, level1 = tl.load(candidates + 2 * best), tl.load(candidates + 2 * best + 1)
    product = tl.sum(importance0 * level0 * value0 + importance1 * level1 * value1, axis=0)
    square = tl.sum(importance0 * level0 * level0 + importance1 * level1 * level1, axis=0)
    return best, (product / square)[None, :]


@triton.jit
def negative(value):
    """Its sign bit."""
    return (value.to(tl.int32, bitcast=True) >> 31) & 1


@triton.jit
def word_of(index, value0, value1, words):
    """The words of candidates, by the signs of the weights."""
    return tl.load(words + index * 4 + negative(value0) * 2 + negative(value1))


@triton.jit
def coded(index, value, step, levels):
    """What the words of candidates decode to at one position, for weights of these signs."""
    level = tl.load(levels + 2 * index) * step
    return round_to_bf16(tl.where(negative(value) != 0, -level, level))


@triton.jit
def fit_groups_kernel(
    weights0,
    weights1,
    row_stride,
    column_stride,
    importances0,
    importances1,
    candidates,
    words,
    multiples,
    words_out,
    steps_out,
    rows,
    columns,
    unit_step,
    CANDIDATES: tl.constexpr,
    MULTIPLES: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[None, :]
    column = (tl.program_id(1) * GROUP + tl.arange(0, GROUP))[:, None]
    inside = (row < rows) & (column < columns)
    place = row * row_stride + column * column_stride
    value0 = tl.load(weights0 + place, mask=inside, other=1.0).to(tl.float32)
    value1 = tl.load(weights1 + place, mask=inside, other=1.0).to(tl.float32)
    importance0, importance1 = tl.load(importances0 + column), tl.load(importances1 + column)
    best, step = fit_steps(
        tl.abs(value0),
        tl.abs(value1),
        importance0,
        importance1,
        candidates,
        multiples,
        unit_step,
        CANDIDATES,
        MULTIPLES,
    )
    tl.store(words_out + row * columns + column, word_of(best, value0, value1, words), mask=inside)
    tl.store(steps_out + row * (columns // GROUP) + tl.program_id(1), step, mask=row < rows)


@triton.jit
def column_of(block, here):
    """The column [1, N] of a block [K, N] that a mask [K, 1] picks."""
    return tl.sum(tl.where(here, block, 0.0), axis=0)[None, :]


@triton.jit
def code_columns_kernel(
    block,
    expert_stride,
    column_stride,
    importances,
    factors,
    candidates,
    words,
    multiples,
    words_out,
    steps_out,
    errors_out,
    rows,
    columns,
    unit_step,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    MULTIPLES: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    pair, all_rows = tl.program_id(1).to(tl.int64), tl.num_programs(1) * rows
    block += 2 * pair * expert_stride
    importances += 2 * pair * columns
    factors += 2 * pair * columns * columns
    errors_out += 2 * pair * columns * rows
    words_out += pair * rows
    steps_out += pair * rows
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[None, :]
    column = tl.arange(0, BLOCK)[:, None]
    inside = (row < rows) & (column < columns)
    left0 = tl.load(block + column * column_stride + row, mask=inside, other=1.0)
    left1 = tl.load(block + expert_stride + column * column_stride + row, mask=inside, other=1.0)
    importance0 = tl.load(importances + column, mask=column < columns, other=0.0)
    importance1 = tl.load(importances + columns + column, mask=column < columns, other=0.0)
    factors1 = factors + columns * columns
    candidate = tl.arange(0, SLOTS)[:, None]
    level0 = tl.load(candidates + 2 * candidate, mask=candidate < CANDIDATES, other=0.0)
    level1 = tl.load(candidates + 2 * candidate + 1, mask=candidate < CANDIDATES, other=0.0)
    for group in range(columns // GROUP):
        own = column // GROUP == group
        own0, own1 = tl.where(own, importance0, 0.0), tl.where(own, importance1, 0.0)
        _best, exact = fit_steps(
            tl.abs(left0), tl.abs(left1), own0, own1, candidates, multiples, unit_step, CANDIDATES, MULTIPLES
        )
        step = round_to_bf16(exact)
        tl.store(steps_out + group * all_rows + row, step, mask=row < rows)
        over = inverse(step)
        for place in range(group * GROUP, group * GROUP + GROUP):
            here = column == place
            value0, value1 = column_of(left0, here), column_of(left1, here)
            index = nearest_of_all(
                tl.abs(value0) * over,
                tl.abs(value1) * over,
                tl.load(importances + place),
                tl.load(importances + columns + place),
                level0,
                level1,
                candidate,
                CANDIDATES,
            )
            tl.store(words_out + place * all_rows + row, word_of(index, value0, value1, words), mask=row < rows)
            later = (column > place) & (column < columns)
            factor = factors + place * columns + column
            factor1 = factors1 + place * columns + column
            error0 = value0 - coded(index, value0, step, candidates)
            error1 = value1 - coded(index, value1, step, candidates + 1)
            error0 /= tl.load(factors + place * columns + place)
            error1 /= tl.load(factors1 + place * columns + place)
            left0 -= tl.load(factor, mask=later, other=0.0) * error0
            left1 -= tl.load(factor1, mask=later, other=0.0) * error1
            tl.store(errors_out + place * rows + row, error0, mask=row < rows)
            tl.store(errors_out + columns * rows + place * rows + row, error1, mask=row < rows)
