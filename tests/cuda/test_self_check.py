"""A kernel that gives wrong products is found before it serves anything."""

from __future__ import annotations

import pytest
import torch

from puzzlemoe_vllm import ops
from puzzlemoe_vllm.backends import cuda, reference, reference_fp8
from puzzlemoe_vllm.backends.cuda_self_check import find_fault
from puzzlemoe_vllm.format.codes import CODES, GROUP_SIZES

CPU = torch.device("cpu")


def no_kernels(code) -> set[str]:
    return set()


def check(spoil) -> str | None:
    """What is found where kernel `new` does to its output what `spoil` does."""

    def fused_experts(x, topk_weights, topk_ids, weights, kernel):
        out = reference.fused_experts(x, topk_weights, topk_ids, weights)
        return spoil(out) if kernel == "new" else out

    return find_fault(CPU, lambda code: {"old", "new"}, no_kernels, reference.prepare, fused_experts)


def test_right_products_pass():
    assert check(lambda out: out) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out.index_fill(0, torch.tensor([len(out) - 1]), 0),
        lambda out: out.index_fill(1, torch.arange(16, 32), 0),
        lambda out: out.roll(1, 1),
        lambda out: out * float("nan"),
    ],
    ids=["a row is missing", "a strip is missing", "columns are elsewhere", "NaN"],
)
def test_wrong_products_are_found(spoil):
    assert "new gives wrong products of " in check(spoil)


def test_a_kernel_that_does_not_start_is_found():
    def spoil(out):
        raise RuntimeError("no kernel image is available")

    assert check(spoil) == "new fails: no kernel image is available"


def test_every_code_is_checked():
    seen = set()

    def fused_experts(x, topk_weights, topk_ids, weights, kernel):
        seen.add(weights.code)
        return reference.fused_experts(x, topk_weights, topk_ids, weights)

    find_fault(CPU, lambda code: {"kernel"}, no_kernels, reference.prepare, fused_experts)
    assert seen == set(CODES)


def test_it_takes_one_thread():
    """Where other processes hold the cores, many threads would wait for each other."""
    before, seen = torch.get_num_threads(), set()

    def fused_experts(x, topk_weights, topk_ids, weights, kernel):
        seen.add(torch.get_num_threads())
        return reference.fused_experts(x, topk_weights, topk_ids, weights)

    torch.set_num_threads(2)
    try:
        find_fault(CPU, lambda code: {"kernel"}, no_kernels, reference.prepare, fused_experts)
        assert seen == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_group_size_is_checked(group_size):
    """There is a kernel for each in e4m3, and paths for some in bf16."""

    def fused_experts(x, topk_weights, topk_ids, weights, kernel):
        steps = weights.w13_steps
        own = steps is not None and x.shape[1] // steps.shape[2] == group_size
        return reference.fused_experts(x, topk_weights, topk_ids, weights) * (1.1 if own else 1)

    fault = find_fault(CPU, lambda code: {"kernel"}, no_kernels, reference.prepare, fused_experts)
    assert "kernel gives wrong products of " in fault


@pytest.mark.parametrize("factor, found", [(1.0, False), (1.1, True)])
def test_what_multiplies_in_e4m3_is_compared_with_that_arithmetic(factor, found):
    def fused_experts(x, topk_weights, topk_ids, weights, kernel):
        return factor * reference_fp8.fused_experts(x, topk_weights, topk_ids, weights)

    angle8 = CODES["angle8"]
    fault = find_fault(
        CPU, no_kernels, lambda code: {"fp8"} if code is angle8 else set(), reference.prepare, fused_experts
    )
    assert found == (fault is not None and "fp8 gives wrong products of angle8 words" in fault)


def test_triton_serves_where_the_check_fails(monkeypatch, caplog):
    ops.backend_for.cache_clear()
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    monkeypatch.setattr(
        cuda, "unavailable", lambda: "library.so failed its check on a GPU: kernel gives wrong products"
    )
    assert ops.backend_for("cuda").__name__ == "puzzlemoe_vllm.backends.triton"
    (line,) = caplog.messages
    assert "Triton" in line and "failed its check" in line
    ops.backend_for.cache_clear()
