"""The kernels that multiply merged experts in e4m3, against the reference of the same arithmetic, on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.layers import (
    DEEPSEEK_V3,
    GLM_AIR,
    MIXTRAL,
    QWEN3,
    QWEN3_NEXT,
    Layer,
    copied,
    generator,
    random_inputs,
    random_weights,
)
from torch import Tensor

from puzzlemoe_vllm.backends import ExpertWeights, cuda, reference, reference_fp8
from puzzlemoe_vllm.format.codes import get_code

REASON = cuda.unavailable()
KERNELS = [] if REASON else cuda.runnable_kernels(torch.device("cuda"), fp8=True)
pytestmark = pytest.mark.skipif(not KERNELS, reason=str(REASON or "no kernel for e4m3 runs on this GPU"))

TOLERANCE = 2e-2
"""Tensor cores sum e4m3 products in about 14 bits, and what that changes of a hidden activation may round to another
e4m3 value, an eighth away.  Quantising itself changes outputs by 3e-2 and more."""


def make_weights(layer: Layer) -> tuple[ExpertWeights, ExpertWeights]:
    loaded = random_weights(layer, generator(0, "cuda"))
    prepared = copied(loaded)
    cuda.prepare(prepared)
    return loaded, prepared


DRAW: list[torch.Generator] = []


def make_inputs(layer: Layer, tokens: int, experts: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """No two alike."""
    DRAW[:] = DRAW or [generator(1, "cuda")]
    return random_inputs(layer, tokens, DRAW[0], experts)


def poison() -> None:
    """Fills the allocator's free memory with NaN, so that scratch or outputs left unwritten show."""
    torch.cuda.synchronize()
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in (1 << 24, 1 << 20, 1 << 16, 1 << 12, 1 << 8)]
    del blocks


def check(
    loaded: ExpertWeights,
    prepared: ExpertWeights,
    inputs: tuple[Tensor, Tensor, Tensor],
    kernel: str,
    tolerance: float = TOLERANCE,
) -> None:
    poison()
    copies = [tensor.clone() for tensor in inputs]
    out = cuda.fused_experts(*inputs, prepared, kernel=kernel)
    expected = reference_fp8.fused_experts(inputs[0].double(), *inputs[1:], loaded)
    assert (out.double() - expected).norm() <= tolerance * expected.norm()
    assert all(torch.equal(before, after) for before, after in zip(copies, inputs, strict=True))


SMALL = (
    Layer(3, 2, 2, 256, 384, "angle8", 128),
    Layer(3, 0, 2, 320, 192, "angle8", 64),
    Layer(3, 2, 2, 352, 224, "angle8", 32),
    Layer(3, 2, 2, 384, 128, "angle6", 128),
    Layer(3, 0, 2, 192, 448, "angle6", 64),
    Layer(3, 2, 2, 32, 96, "angle6", 32),
)


@pytest.fixture(scope="module", params=SMALL, ids=str)
def small(request):
    layer = request.param
    return layer, *make_weights(layer)


@pytest.mark.parametrize("kernel", KERNELS)
def test_token_counts(small, kernel):
    layer, loaded, prepared = small
    for tokens in (1, 7, 8, 9, 31, 33, 127, 129, 255, 257, 512, 771, 2049, 4097):
        check(loaded, prepared, make_inputs(layer, tokens), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_expert_takes_all(small, kernel):
    layer, loaded, prepared = small
    for expert in (0, 3, layer.experts - 1):
        for tokens in (256, 257, 1300):
            x, topk_weights, topk_ids = make_inputs(layer, tokens)
            check(loaded, prepared, (x, topk_weights, topk_ids.fill_(expert)), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_skipped_rows_are_zero(small, kernel):
    layer, loaded, prepared = small
    for tokens in (1, 300, 4000):
        x, topk_weights, topk_ids = make_inputs(layer, tokens)
        poison()
        assert not cuda.fused_experts(x, topk_weights, torch.full_like(topk_ids, -1), prepared, kernel=kernel).any()
        topk_ids[torch.rand(topk_ids.shape, device="cuda") < 0.5] = -1
        topk_ids[0] = -1
        check(loaded, prepared, (x, topk_weights, topk_ids), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_expert_map(small, kernel):
    layer, loaded, prepared = small
    expert_map = torch.full((20,), -1, dtype=torch.int32, device="cuda")
    expert_map[6 : 6 + layer.experts] = torch.arange(layer.experts, dtype=torch.int32, device="cuda")
    loaded, prepared = (dataclasses.replace(weights, expert_map=expert_map) for weights in (loaded, prepared))
    for tokens in (1, 900):
        check(loaded, prepared, make_inputs(layer, tokens, experts=20), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_steps_of_zero_in_any_group(kernel):
    """A rank whose share cuts a group has steps of zero at its edges; a row may have them anywhere, or nothing else."""
    layer = Layer(1, 0, 1, 384, 256, "angle8", 32)
    loaded = random_weights(layer, generator(3, "cuda"))
    assert loaded.w13_steps is not None and loaded.w2_steps is not None
    for steps in (loaded.w13_steps, loaded.w2_steps):
        steps[:, ::2][torch.rand(steps[:, ::2].shape, device="cuda") < 0.4] = 0
        steps[:, 5] = 0
        steps[:, :, 0] = 0
        steps[:, 7, :-1] = 0
    loaded.w2_steps[:, 11] *= -1
    prepared = copied(loaded)
    cuda.prepare(prepared)
    check(loaded, prepared, make_inputs(layer, 300), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_zeros_tiny_rows_and_rows_that_are_not_finite(small, kernel):
    layer, loaded, prepared = small
    x, topk_weights, topk_ids = make_inputs(layer, 200)
    topk_ids %= 2 * layer.pairs
    x[3], x[4] = 0, x[4] * 2.0**-60
    check(loaded, prepared, (x, topk_weights, topk_ids), kernel)
    assert not cuda.fused_experts(x, topk_weights, topk_ids, prepared, kernel=kernel)[3].any()
    x[5, 0], x[6, 1] = float("nan"), float("inf")
    out = cuda.fused_experts(x, topk_weights, topk_ids, prepared, kernel=kernel)
    assert out[5:7].isnan().all()
    assert out[:5].isfinite().all() and out[7:].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_bits_for_equal_inputs_and_in_a_graph(small, kernel):
    layer, loaded, prepared = small
    static = make_inputs(layer, 3000)
    outs = [cuda.fused_experts(*static, prepared, kernel=kernel) for _ in range(3)]
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda.fused_experts(*static, prepared, kernel=kernel)
    for held, fresh in zip(static, make_inputs(layer, 3000), strict=True):
        held.copy_(fresh)
    out.fill_(float("nan"))
    graph.replay()
    expected = reference_fp8.fused_experts(static[0].double(), *static[1:], loaded)
    assert (out.double() - expected).norm() <= TOLERANCE * expected.norm()


MODELS = {
    "Mixtral-8x7B": MIXTRAL,
    "Qwen3-30B-A3B": QWEN3,
    "GLM-4.5-Air": GLM_AIR,
    "Qwen3-Next-80B-A3B": QWEN3_NEXT,
    # Of eight expert-parallel ranks' experts, one's.
    "DeepSeek-V3": dataclasses.replace(DEEPSEEK_V3, pairs=DEEPSEEK_V3.pairs // 8),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("code", ["angle8", "angle6"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_real_shapes(model, code, kernel):
    """At a depth of 14336 too, sums in fewer bits stay far below what quantising changes; nor do they shrink."""
    layer = model.coded(code, 128)
    loaded, prepared = make_weights(layer)
    inputs = make_inputs(layer, 600)
    check(loaded, prepared, inputs, kernel)
    out = cuda.fused_experts(*inputs, prepared, kernel=kernel).double()
    expected = reference_fp8.fused_experts(inputs[0].double(), *inputs[1:], loaded)
    assert abs((out * expected).sum() / (expected * expected).sum() - 1) < 5e-3
    exact = reference.fused_experts(inputs[0].double(), *inputs[1:], loaded)
    quantising = (expected - exact).norm()
    assert (out - exact).norm() < 1.1 * quantising
    torch.cuda.empty_cache()


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
