"""The CUDA library against the float64 reference, on a GPU.

Under the sanitizer, where everything is slow: compute-sanitizer --tool memcheck python -m pytest -k test_sizes, and the
same with racecheck.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from puzzlemoe_vllm.backends import ExpertWeights, cuda, reference
from puzzlemoe_vllm.format.codes import MergedPair, get_code

REASON = cuda.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

KERNELS = [] if REASON else cuda.runnable_kernels(torch.device("cuda"))
TOLERANCE = 5e-3
"""Hidden activations, expert outputs and the result are rounded to bf16: 2^-9 each at most."""


@dataclass(frozen=True)
class Layer:
    pairs: int
    dense: int
    topk: int
    hidden: int
    intermediate: int
    code: str = "mask16"


MODELS = {
    "Mixtral-8x7B": Layer(4, 0, 2, 4096, 14336),
    "Qwen3-30B-A3B": Layer(64, 0, 8, 2048, 768),
    "DeepSeek-MoE-16B": Layer(32, 0, 6, 2048, 1408),
    "Qwen1.5-MoE": Layer(30, 0, 4, 2048, 1408),
}


def pair_words(layer: Layer, rows: int, columns: int) -> Tensor:
    """Encoded words [pairs, rows, columns] of weights of usual size, on the GPU."""
    code = get_code(layer.code)
    words = torch.empty(layer.pairs, *code.words_shape(rows, columns), dtype=code.dtype, device="cuda")
    for matrix in words:
        magnitude = torch.randn(rows, columns, device="cuda").abs() * columns**-0.5
        state = torch.randint(0, 4, (rows, columns), device="cuda")
        negative = torch.randint(0, 4, (rows, columns), device="cuda")
        masks = (state != 1, state != 2)
        matrix.copy_(code.encode(MergedPair(magnitude, masks, (negative % 2 == 1, negative // 2 == 1))))
    return words


def make_weights(layer: Layer, seed: int = 0) -> tuple[ExpertWeights, ExpertWeights]:
    """The same random layer as loaded and as prepared for the kernels."""
    torch.manual_seed(seed)
    dense = [
        torch.randn(layer.dense, rows, columns, device="cuda", dtype=torch.bfloat16) * columns**-0.5
        for rows, columns in ((2 * layer.intermediate, layer.hidden), (layer.hidden, layer.intermediate))
    ]
    loaded = ExpertWeights(
        pair_words(layer, 2 * layer.intermediate, layer.hidden),
        pair_words(layer, layer.hidden, layer.intermediate),
        *dense,
        expert_map=None,
        code=layer.code,
    )
    prepared = dataclasses.replace(
        loaded,
        **{name: getattr(loaded, name).clone() for name in ("w13_pairs", "w2_pairs", "w13_dense", "w2_dense")},
    )
    cuda.prepare(prepared)
    return loaded, prepared


def make_inputs(layer: Layer, tokens: int, experts: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x, topk_weights, topk_ids of random routing over `experts`."""
    x = torch.randn(tokens, layer.hidden, device="cuda", dtype=torch.bfloat16)
    scores = torch.rand(tokens, experts or 2 * layer.pairs + layer.dense, device="cuda")
    topk_weights, topk_ids = scores.topk(layer.topk)
    return x, topk_weights, topk_ids.to(torch.int32)


def poison() -> None:
    """Fills the allocator's free memory with NaN, so that scratch or outputs left unwritten show."""
    torch.cuda.synchronize()
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in (1 << 24, 1 << 20, 1 << 16, 1 << 12, 1 << 8)]
    del blocks


def error(out: Tensor, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, loaded: ExpertWeights) -> float:
    """Relative error against the float64 reference; NaN fails every comparison."""
    expected = reference.fused_experts(x.double(), topk_weights, topk_ids, loaded)
    return ((out.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def check(loaded: ExpertWeights, prepared: ExpertWeights, inputs: tuple[Tensor, Tensor, Tensor], kernel: str) -> None:
    poison()
    copies = [tensor.clone() for tensor in inputs]
    out = cuda.fused_experts(*inputs, prepared, kernel=kernel)
    assert error(out, *inputs, loaded) < TOLERANCE
    assert all(torch.equal(before, after) for before, after in zip(copies, inputs, strict=True))


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    layer = MODELS[request.param]
    yield layer, *make_weights(layer)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("kernel", KERNELS)
def test_real_shapes(model, kernel):
    layer, loaded, prepared = model
    for tokens in (1, 3, 33, 257):
        check(loaded, prepared, make_inputs(layer, tokens), kernel)


SMALL = Layer(pairs=3, dense=2, topk=2, hidden=256, intermediate=176)
EDGE_TOKENS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513)


@pytest.fixture(scope="module")
def small():
    return SMALL, *make_weights(SMALL)


@pytest.mark.parametrize("kernel", KERNELS)
def test_token_counts(small, kernel):
    layer, loaded, prepared = small
    for tokens in EDGE_TOKENS:
        check(loaded, prepared, make_inputs(layer, tokens), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("hidden, intermediate", [(16, 16), (48, 96), (128, 96), (144, 352), (2048, 176), (272, 80)])
def test_sizes(hidden, intermediate, kernel):
    layer = Layer(2, 1, 2, hidden, intermediate)
    loaded, prepared = make_weights(layer)
    for tokens in (1, 17, 200):
        check(loaded, prepared, make_inputs(layer, tokens), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_dense_and_only_pairs(kernel):
    for pairs, dense in ((0, 3), (2, 0)):
        layer = Layer(pairs, dense, 2, 128, 96)
        loaded, prepared = make_weights(layer)
        check(loaded, prepared, make_inputs(layer, 40), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_expert_takes_all(small, kernel):
    layer, loaded, prepared = small
    for expert in (0, 3, 7):
        x, topk_weights, topk_ids = make_inputs(layer, 300)
        topk_ids.fill_(expert)
        check(loaded, prepared, (x, topk_weights, topk_ids), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_position_one_is_active(small, kernel):
    layer, loaded, prepared = small
    for tokens in (1, 50):
        x, topk_weights, topk_ids = make_inputs(layer, tokens)
        check(loaded, prepared, (x, topk_weights, (topk_ids % 3) * 2 + 1), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_skipped_rows_are_zero(small, kernel):
    layer, loaded, prepared = small
    for tokens in (1, 5, 300, 4000):
        x, topk_weights, topk_ids = make_inputs(layer, tokens)
        poison()
        out = cuda.fused_experts(x, topk_weights, torch.full_like(topk_ids, -1), prepared, kernel=kernel)
        assert not out.any()
        topk_ids[torch.rand(topk_ids.shape, device="cuda") < 0.5] = -1
        topk_ids[0] = -1
        check(loaded, prepared, (x, topk_weights, topk_ids), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_expert_map(small, kernel):
    layer, loaded, prepared = small
    expert_map = torch.full((20,), -1, dtype=torch.int32, device="cuda")
    expert_map[6:14] = torch.arange(8, dtype=torch.int32, device="cuda")
    loaded, prepared = (dataclasses.replace(weights, expert_map=expert_map) for weights in (loaded, prepared))
    for tokens in (1, 90):
        check(loaded, prepared, make_inputs(layer, tokens, experts=20), kernel)


def test_many_experts():
    layer = Layer(200, 112, 8, 64, 32)
    loaded, prepared = make_weights(layer)
    for kernel in KERNELS:
        for tokens in (1, 100, 3000):
            check(loaded, prepared, make_inputs(layer, tokens), kernel)


@pytest.mark.parametrize("tokens", [512, 513, 4097, 65536])
def test_long_batches(small, tokens):
    layer, loaded, prepared = small
    inputs = make_inputs(layer, tokens)
    for kernel in {KERNELS[0], KERNELS[-1]}:
        check(loaded, prepared, inputs, kernel)


def test_no_tokens(small):
    layer, _, prepared = small
    assert cuda.fused_experts(*make_inputs(layer, 0), prepared).shape == (0, layer.hidden)


@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_bits_for_equal_inputs(small, kernel):
    layer, _, prepared = small
    inputs = make_inputs(layer, 400)
    outs = [cuda.fused_experts(*inputs, prepared, kernel=kernel) for _ in range(5)]
    assert all(torch.equal(outs[0], out) for out in outs[1:])


@pytest.mark.parametrize("kernel", KERNELS)
def test_graph_replay_with_changing_routing(small, kernel):
    layer, loaded, prepared = small
    for tokens in (4, 3000):
        static = make_inputs(layer, tokens)
        cuda.fused_experts(*static, prepared, kernel=kernel)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = cuda.fused_experts(*static, prepared, kernel=kernel)
        for _ in range(3):
            inputs = make_inputs(layer, tokens)
            inputs[2][torch.rand(inputs[2].shape, device="cuda") < 0.3] = -1
            for held, fresh in zip(static, inputs, strict=True):
                held.copy_(fresh)
            out.fill_(float("nan"))
            graph.replay()
            assert error(out, *inputs, loaded) < TOLERANCE


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_streams(small, kernel):
    layer, loaded, prepared = small
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [make_inputs(layer, 150) for _ in streams]
    torch.cuda.synchronize()
    outs: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for stream, given, kept in zip(streams, inputs, outs, strict=True):
            with torch.cuda.stream(stream):
                kept.append(cuda.fused_experts(*given, prepared, kernel=kernel))
    torch.cuda.synchronize()
    for given, kept in zip(inputs, outs, strict=True):
        assert error(kept[0], *given, loaded) < TOLERANCE
        assert all(torch.equal(kept[0], out) for out in kept)


def test_dispatch_table_serves_every_load(small):
    layer, loaded, prepared = small
    for tokens in (1, 20, 40, 80, 160, 900):
        inputs = make_inputs(layer, tokens)
        poison()
        assert error(cuda.fused_experts(*inputs, prepared), *inputs, loaded) < TOLERANCE


def test_all_words_decode_as_algorithm_1():
    """Every one of the 65,536 words, multiplied by one, in both positions."""
    words = torch.arange(-(1 << 15), 1 << 15, device="cuda").to(torch.int16)
    layer = Layer(1, 0, 1, 256, 256)
    loaded, prepared = make_weights(layer)
    for weights in (loaded, prepared):
        weights.w13_pairs.zero_()
    gates = loaded.w13_pairs[0]
    identity = get_code("mask16").encode(
        MergedPair(
            torch.eye(256, device="cuda"),
            (torch.ones(256, 256, dtype=torch.bool, device="cuda"),) * 2,
            (torch.zeros(256, 256, dtype=torch.bool, device="cuda"),) * 2,
        )
    )
    gates[:256] = identity  # hidden[i] = SiLU(x[i]) * x[i]
    gates[256:] = identity
    loaded.w2_pairs[0] = words.view(256, 256)
    prepared = dataclasses.replace(loaded, w13_pairs=loaded.w13_pairs.clone(), w2_pairs=loaded.w2_pairs.clone())
    cuda.prepare(prepared)
    x = torch.eye(256, device="cuda", dtype=torch.bfloat16) * 4
    scale = reference.fused_experts(
        x[:1],
        torch.ones(1, 1, device="cuda"),
        torch.zeros(1, 1, dtype=torch.int32, device="cuda"),
        dataclasses.replace(loaded, w2_pairs=identity[None]),
    )[0, 0].float()
    for position in (0, 1):
        expected = get_code("mask16").decode(words.view(256, 256), position).float() * scale
        ids = torch.full((256, 1), position, dtype=torch.int32, device="cuda")
        for kernel in KERNELS:
            out = cuda.fused_experts(x, torch.ones(256, 1, device="cuda"), ids, prepared, kernel=kernel)
            torch.testing.assert_close(out.T.float(), expected, rtol=2**-7, atol=1e-30)
