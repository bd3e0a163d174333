"""What is asked of the kernels in e4m3 alone, on a GPU: test_cuda_kernels.py has the rest."""

from __future__ import annotations

import pytest
import torch
from support.kernel_cases import REASON, cases, kernels
from support.layers import DEEPSEEK_V3_RANK, GLM_AIR, MIXTRAL, QWEN3, QWEN3_NEXT, Layer, copied

from puzzlemoe_vllm.backends import ExpertWeights, cuda, reference, reference_fp8
from puzzlemoe_vllm.format.codes import get_code

KERNELS = kernels("angle8", fp8=True)
pytestmark = pytest.mark.skipif(not KERNELS, reason=str(REASON or "no kernel for e4m3 runs on this GPU"))

of_both = pytest.mark.parametrize(
    "case", cases(Layer(3, 2, 2, 352, 224, "angle8", 32), Layer(3, 0, 2, 192, 448, "angle6", 64), fp8=True), ids=str
)


@pytest.mark.parametrize("case", cases(Layer(1, 0, 1, 384, 256, "angle8", 32), fp8=True), ids=str)
def test_steps_of_zero_in_any_group(case):
    """A rank whose share cuts a group has steps of zero at its edges; a row may have them anywhere, or nothing else."""
    loaded = copied(case.weights()[0])
    assert loaded.w13_steps is not None and loaded.w2_steps is not None
    for steps in (loaded.w13_steps, loaded.w2_steps):
        steps[:, ::2][torch.rand(steps[:, ::2].shape, device="cuda") < 0.4] = 0
        steps[:, 5] = 0
        steps[:, :, 0] = 0
        steps[:, 7, :-1] = 0
    loaded.w2_steps[:, 11] *= -1
    prepared = copied(loaded)
    cuda.prepare(prepared)
    x, *routing = case.inputs(300)
    out = cuda.fused_experts(x, *routing, prepared, kernel=case.kernel).double()
    expected = reference_fp8.fused_experts(x.double(), *routing, loaded)
    assert (out - expected).norm() < case.tolerance(len(x)) * expected.norm()


@of_both
def test_rows_of_zeros_tiny_rows_and_rows_that_are_not_finite(case):
    x, topk_weights, topk_ids = case.inputs(200)
    topk_ids %= 2 * case.layer.pairs
    x[3], x[4] = 0, x[4] * 2.0**-60
    case.check((x, topk_weights, topk_ids))
    assert not case.multiply((x, topk_weights, topk_ids))[3].any()
    x[5, 0], x[6, 1] = float("nan"), float("inf")
    out = case.multiply((x, topk_weights, topk_ids))
    assert out[5:7].isnan().all()
    assert out[:5].isfinite().all() and out[7:].isfinite().all()


@of_both
def test_equal_bits_where_slots_are_in_no_fixed_order(case):
    inputs = case.inputs(3000)
    outs = [case.multiply(inputs) for _ in range(3)]
    assert all(torch.equal(outs[0], out) for out in outs[1:])


MODELS = (MIXTRAL, QWEN3, GLM_AIR, QWEN3_NEXT, DEEPSEEK_V3_RANK)


@pytest.mark.parametrize(
    "case", cases(*(model.coded(code, 128) for model in MODELS for code in ("angle8", "angle6")), fp8=True), ids=str
)
def test_real_shapes(case):
    """At a depth of 14336 too, sums in fewer bits stay far below what quantising changes, and shrink little."""
    inputs = case.inputs(600)
    case.check(inputs)
    x, *routing = inputs
    loaded = case.weights()[0]
    out = case.multiply(inputs).double()
    expected = reference_fp8.fused_experts(x.double(), *routing, loaded)
    # By half a percent: what a sum drops of its products is all of one sign.
    assert abs((out * expected).sum() / (expected * expected).sum() - 1) < 7.5e-3
    exact = reference.fused_experts(x.double(), *routing, loaded)
    quantising = (expected - exact).norm()
    assert (out - exact).norm() < 1.1 * quantising


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("code", ["angle8", "angle6"])
def test_every_word_is_its_e4m3_value(code, kernel):
    """Each word as a down projection's weight, in both positions: hidden activations are diagonal, one value alike."""
    size, kind = 256, get_code(code)
    words = torch.arange(1 << kind.bits, device="cuda", dtype=torch.uint8)
    values = kind.e4m3_values().float().cuda()
    plus = int(values.sum(0).argmax())
    minus = int((values == -values[:, plus, None]).all(0).nonzero()[0, 0])
    signs = torch.ones(1, 1, device="cuda")
    while len(signs) < size:
        signs = torch.kron(signs, torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cuda"))
    hadamard = torch.where(signs > 0, words[plus], words[minus]).repeat(2, 1)
    down = words.repeat(size * size // len(words)).view(size, size)
    step = (torch.rand(size, 2, device="cuda") + 0.5).bfloat16()
    weights = ExpertWeights(
        kind.pack(hadamard)[None].clone(),
        kind.pack(down)[None].clone(),
        torch.empty(0, 2 * size, size, dtype=torch.bfloat16, device="cuda"),
        torch.empty(0, size, size, dtype=torch.bfloat16, device="cuda"),
        expert_map=None,
        code=code,
        w13_steps=torch.ones(1, 2 * size, 2, dtype=torch.bfloat16, device="cuda"),
        w2_steps=step[None].clone(),
    )
    loaded = copied(weights)
    cuda.prepare(weights)
    x = signs.bfloat16() / 64
    for position in (0, 1):
        inputs = (x, torch.ones(size, 1, device="cuda"), torch.full((size, 1), position, device="cuda"))
        expected = reference_fp8.fused_experts(x.double(), *inputs[1:], loaded)
        out = cuda.fused_experts(*inputs, weights, kernel=kernel)
        torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=float(expected.abs().max()) * 2**-9)
