"""The CUDA library against the float64 reference, on a GPU.

Under the sanitizer, where everything is slow: compute-sanitizer --tool memcheck python -m pytest -k test_sizes, and the
same with racecheck.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from support.layers import (
    DEEPSEEK,
    DEEPSEEK_V3,
    GLM_AIR,
    MINIMAX_M2,
    MIXTRAL,
    QWEN3,
    QWEN3_NEXT,
    QWEN15,
    Layer,
    copied,
    generator,
    random_inputs,
    random_weights,
)
from torch import Tensor

from puzzlemoe_vllm.backends import ExpertWeights, cuda, reference
from puzzlemoe_vllm.format.codes import CODES, TrellisCode, get_code
from puzzlemoe_vllm.format.codes.base import EntrywiseCode

REASON = cuda.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

KERNELS = [] if REASON else cuda.runnable_kernels(torch.device("cuda"))
TOLERANCE = 5e-3
"""Hidden activations, expert outputs and the result are rounded to bf16: 2^-9 each at most."""

STEP_TOLERANCE = 8e-3
"""With steps: kernels for few tokens multiply sums by them, which leaves out the rounding of each weight."""


MODELS = {
    "Mixtral-8x7B": MIXTRAL,
    "Qwen3-30B-A3B": QWEN3,
    "DeepSeek-MoE-16B": DEEPSEEK,
    "Qwen1.5-MoE": QWEN15,
    "Mixtral-8x7B angle16": MIXTRAL.coded("angle16"),
    **{
        f"Mixtral-8x7B {code}": MIXTRAL.coded(code, 128)
        for code in ("angle8", "angle6", "mask6", "trellis8", "trellis5", "trellis3")
    },
    "Qwen3-30B-A3B angle8": QWEN3.coded("angle8", 128),
    "Qwen3-30B-A3B trellis6": QWEN3.coded("trellis6", 64),
    "DeepSeek-MoE-16B trellis4": DEEPSEEK.coded("trellis4", 128),
}


def make_weights(layer: Layer) -> tuple[ExpertWeights, ExpertWeights]:
    """The same random layer as loaded and as prepared for the kernels."""
    loaded = random_weights(layer, generator(0, "cuda"))
    prepared = copied(loaded)
    cuda.prepare(prepared)
    return loaded, prepared


@functools.cache
def draw() -> torch.Generator:
    """Of all inputs, no two alike."""
    return generator(1, "cuda")


def make_inputs(layer: Layer, tokens: int, experts: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return random_inputs(layer, tokens, draw(), experts)


def poison() -> None:
    """Fills the allocator's free memory with NaN, so that scratch or outputs left unwritten show."""
    torch.cuda.synchronize()
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in (1 << 24, 1 << 20, 1 << 16, 1 << 12, 1 << 8)]
    del blocks


def error(out: Tensor, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, loaded: ExpertWeights) -> float:
    """Relative error against the float64 reference; NaN fails every comparison."""
    return distance(out, reference.fused_experts(x.double(), topk_weights, topk_ids, loaded))


def distance(out: Tensor, expected: Tensor) -> float:
    """||difference|| / ||expected||."""
    return ((out.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def tolerance(weights: ExpertWeights) -> float:
    return TOLERANCE if weights.w13_steps is None else STEP_TOLERANCE


def check(loaded: ExpertWeights, prepared: ExpertWeights, inputs: tuple[Tensor, Tensor, Tensor], kernel: str) -> None:
    poison()
    copies = [tensor.clone() for tensor in inputs]
    out = cuda.fused_experts(*inputs, prepared, kernel=kernel)
    assert error(out, *inputs, loaded) < tolerance(loaded)
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


LARGE = {
    "GLM-4.5-Air": GLM_AIR,
    "GLM-4.5-Air angle8": GLM_AIR.coded("angle8", 128),
    "Qwen3-Next-80B-A3B": QWEN3_NEXT,
    "Qwen3-Next-80B-A3B trellis6": QWEN3_NEXT.coded("trellis6", 64),
    "MiniMax-M2 angle8": MINIMAX_M2.coded("angle8", 128),
    "MiniMax-M2 trellis4": MINIMAX_M2.coded("trellis4", 128),
    # Of eight expert-parallel ranks' experts, one's.
    "DeepSeek-V3": dataclasses.replace(DEEPSEEK_V3, pairs=DEEPSEEK_V3.pairs // 8),
    "DeepSeek-V3 angle8": dataclasses.replace(DEEPSEEK_V3.coded("angle8", 128), pairs=DEEPSEEK_V3.pairs // 8),
}


@pytest.mark.parametrize("name", LARGE)
def test_shapes_of_large_models(name):
    """A token, a few and a prefill; what is expected is computed once, of the experts that some token chose."""
    layer = LARGE[name]
    loaded, prepared = make_weights(layer)
    experts = DEEPSEEK_V3.experts if name.startswith("DeepSeek") else layer.experts
    if experts > layer.experts:
        local = torch.arange(experts, dtype=torch.int32, device="cuda") - layer.experts
        local = local.where((local >= 0) & (local < layer.experts), -1)
        loaded, prepared = (dataclasses.replace(weights, expert_map=local) for weights in (loaded, prepared))
    for tokens in (1, 20, 300):
        inputs = make_inputs(layer, tokens, experts)
        expected = reference.fused_experts(inputs[0].double(), *inputs[1:], loaded)
        for kernel in KERNELS:
            poison()
            assert distance(cuda.fused_experts(*inputs, prepared, kernel=kernel), expected) < tolerance(loaded), kernel
    del loaded, prepared
    torch.cuda.empty_cache()


SMALL = {
    "mask16": Layer(pairs=3, dense=2, top_k=2, hidden=256, intermediate=176),
    "angle16": Layer(3, 2, 2, 256, 176, "angle16"),
    "angle8": Layer(3, 2, 2, 256, 224, "angle8", 32),
    "angle6": Layer(3, 2, 2, 256, 192, "angle6", 64),
    "mask6": Layer(3, 2, 2, 384, 128, "mask6", 128),
    "trellis6": Layer(3, 2, 2, 256, 224, "trellis6", 32),
    "trellis3": Layer(3, 2, 2, 384, 128, "trellis3", 128),
}
EDGE_TOKENS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513)


@pytest.fixture(scope="module", params=SMALL)
def small(request):
    layer = SMALL[request.param]
    return layer, *make_weights(layer)


@pytest.mark.parametrize("kernel", KERNELS)
def test_token_counts(small, kernel):
    layer, loaded, prepared = small
    for tokens in EDGE_TOKENS:
        check(loaded, prepared, make_inputs(layer, tokens), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "layer",
    [
        *(Layer(2, 1, 2, *size) for size in ((16, 16), (48, 96), (128, 96), (144, 352), (2048, 176), (272, 80))),
        *(Layer(2, 1, 2, *size, "angle16") for size in ((16, 16), (144, 352))),
        *(
            Layer(2, 1, 2, *size)
            for size in ((32, 32, "angle8", 32), (352, 96, "angle8", 32), (2048, 192, "angle8", 64))
        ),
        *(Layer(2, 1, 2, *size) for size in ((32, 96, "angle6", 32), (128, 384, "angle6", 128))),
        *(Layer(2, 1, 2, *size) for size in ((96, 32, "mask6", 32), (2048, 128, "mask6", 128))),
        *(Layer(2, 0, 2, *size, f"trellis{bits}", 32) for bits in (8, 6, 5, 4, 3) for size in ((32, 32), (352, 96))),
        *(Layer(2, 1, 2, 2048, 192, f"trellis{bits}", 64) for bits in (8, 5, 4)),
        *(Layer(2, 1, 2, 128, 384, f"trellis{bits}", 128) for bits in (6, 3)),
    ],
    ids=str,
)
def test_sizes(layer, kernel):
    loaded, prepared = make_weights(layer)
    for tokens in (1, 17, 200):
        check(loaded, prepared, make_inputs(layer, tokens), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_dense_and_only_pairs(kernel):
    for pairs, dense in ((0, 3), (2, 0)):
        for code in ((), ("angle8", 32)):
            layer = Layer(pairs, dense, 2, 128, 96, *code)
            loaded, prepared = make_weights(layer)
            check(loaded, prepared, make_inputs(layer, 40), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_expert_takes_all(small, kernel):
    layer, loaded, prepared = small
    for expert in (0, 3, 7):
        for tokens in (9, 32, 300):
            x, topk_weights, topk_ids = make_inputs(layer, tokens)
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


# Qwen3-Next's and Kimi-K2's numbers of experts, all in pairs; a quarter saved, in which most are dense.
@pytest.mark.parametrize("layer", [Layer(256, 0, 10, 64, 32), Layer(192, 0, 8, 64, 32), Layer(200, 112, 8, 64, 32)])
def test_many_experts(layer):
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
    for tokens in (2, 20, 400):
        inputs = make_inputs(layer, tokens)
        outs = [cuda.fused_experts(*inputs, prepared, kernel=kernel) for _ in range(5)]
        assert all(torch.equal(outs[0], out) for out in outs[1:])


@pytest.mark.parametrize("kernel", KERNELS)
def test_graphs_on_two_streams(small, kernel):
    layer, _, prepared = small
    inputs = [make_inputs(layer, tokens) for tokens in (3, 8)]
    expected = [cuda.fused_experts(*given, prepared, kernel=kernel) for given in inputs]
    graphs, outs = [torch.cuda.CUDAGraph() for _ in inputs], []
    for graph, given in zip(graphs, inputs, strict=True):
        with torch.cuda.graph(graph):
            outs.append(cuda.fused_experts(*given, prepared, kernel=kernel))
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(100):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, right) for out, right in zip(outs, expected, strict=True))


def test_long_batches_in_several_calls(small, monkeypatch):
    layer, loaded, prepared = small
    monkeypatch.setattr(cuda, "CALL_TOKENS", 100)
    for tokens in (100, 257):
        inputs = make_inputs(layer, tokens)
        poison()
        assert error(cuda.fused_experts(*inputs, prepared), *inputs, loaded) < tolerance(loaded)


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
            assert error(out, *inputs, loaded) < tolerance(loaded)


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_streams(small, kernel):
    layer, loaded, prepared = small
    streams = [torch.cuda.Stream() for _ in range(4)]
    inputs = [make_inputs(layer, tokens) for tokens in (150, 150, 3, 8)]
    torch.cuda.synchronize()
    outs: list[list[Tensor]] = [[] for _ in streams]
    for _ in range(20):
        for stream, given, kept in zip(streams, inputs, outs, strict=True):
            with torch.cuda.stream(stream):
                kept.append(cuda.fused_experts(*given, prepared, kernel=kernel))
    torch.cuda.synchronize()
    for given, kept in zip(inputs, outs, strict=True):
        assert error(kept[0], *given, loaded) < tolerance(loaded)
        assert all(torch.equal(kept[0], out) for out in kept)


def test_dispatch_table_serves_every_load(small):
    layer, loaded, prepared = small
    for tokens in (1, 20, 40, 80, 160, 900):
        inputs = make_inputs(layer, tokens)
        poison()
        assert error(cuda.fused_experts(*inputs, prepared), *inputs, loaded) < tolerance(loaded)


def every_word(code: str) -> Tensor:
    """All words of a code, one an element, [65536] or [2^bits], on the GPU."""
    if get_code(code).dtype == torch.int16:
        return torch.arange(-(1 << 15), 1 << 15, device="cuda").to(torch.int16)
    return torch.arange(1 << get_code(code).bits, device="cuda", dtype=torch.uint8)


def decoded(code: str, words: Tensor, position: int, step: Tensor) -> Tensor:
    """float32 weights of words [N, K] that are one an element, with a step per row where the code has them."""
    kind = get_code(code)
    return kind.decode(kind.pack(words), position, step if kind.has_steps else None).float()


ENTRYWISE = [name for name, code in CODES.items() if isinstance(code, EntrywiseCode)]
TRELLISES = [name for name, code in CODES.items() if isinstance(code, TrellisCode)]


@pytest.mark.parametrize("code", ENTRYWISE)
def test_every_word_decodes_as_the_format_says(code):
    """Each of a code's words as a down projection's weight, in both positions.

    Gate and up hold one magnitude with the signs of a Hadamard matrix, and token t is its row t: hidden activations are
    then exactly diagonal, and the output is the decoded matrix.
    """
    size, has_steps, pack = 256, get_code(code).has_steps, get_code(code).pack
    words = every_word(code)
    unit = torch.ones(len(words), 1, dtype=torch.bfloat16, device="cuda")
    first, second = (decoded(code, words[:, None].repeat(1, 32), p, unit)[:, 0] for p in (0, 1))
    near_one = (first - 1) ** 2 + (second - 1) ** 2
    plus = int(near_one.argmin())
    minus = int(((first == -first[plus]) & (second == -second[plus])).nonzero()[0, 0])
    signs = torch.ones(1, 1, device="cuda")
    while len(signs) < size:
        signs = torch.kron(signs, torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cuda"))
    hadamard = torch.where(signs > 0, words[plus], words[minus]).repeat(2, 1)
    down = words.repeat(size * size // len(words)).view(size, size)
    step = (torch.rand(size, 2, device="cuda") + 0.5).bfloat16()
    weights = ExpertWeights(
        pack(hadamard)[None].clone(),
        pack(down)[None].clone(),
        torch.empty(0, 2 * size, size, dtype=torch.bfloat16, device="cuda"),
        torch.empty(0, size, size, dtype=torch.bfloat16, device="cuda"),
        expert_map=None,
        code=code,
        w13_steps=torch.ones(1, 2 * size, 2, dtype=torch.bfloat16, device="cuda") if has_steps else None,
        w2_steps=step[None].clone() if has_steps else None,
    )
    cuda.prepare(weights)
    x = signs.bfloat16() / 64
    for position, value in ((0, first[plus]), (1, second[plus])):
        activation = torch.nn.functional.silu(value * size / 64) * value * size / 64
        expected = decoded(code, down, position, step) * activation.bfloat16().float()
        ids = torch.full((size, 1), position, dtype=torch.int32, device="cuda")
        for kernel in KERNELS:
            out = cuda.fused_experts(x, torch.ones(size, 1, device="cuda"), ids, weights, kernel=kernel)
            torch.testing.assert_close(out.T.float(), expected, rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize("code", TRELLISES)
def test_every_state_decodes_as_the_format_says(code):
    """Nearly all of a trellis's states as a down projection's weights, in both positions.

    Of row i of gate and up, only group i of columns has a step above zero, and token t has one value, in group t: the
    hidden activations are then diagonal, and the output is the decoded matrix, a number times each of its columns.
    """
    intermediate, group = 128, 32
    hidden, kind, source = intermediate * group, get_code(code), draw()
    words, tall = (
        torch.randint(0, 256, kind.words_shape(*size), generator=source, device="cuda", dtype=torch.uint8)
        for size in ((2 * intermediate, hidden), (hidden, intermediate))
    )
    states = kind.states(tall).unique()
    assert len(states) > 0.99 * 2**kind.state_bits
    steps = torch.eye(intermediate, dtype=torch.bfloat16, device="cuda").repeat(2, 1) / 16
    tall_steps = (torch.rand(hidden, intermediate // group, generator=source, device="cuda") + 0.5).bfloat16()
    dense = torch.empty(0, 2 * intermediate, hidden, dtype=torch.bfloat16, device="cuda")
    tall_dense = torch.empty(0, hidden, intermediate, dtype=torch.bfloat16, device="cuda")
    weights = ExpertWeights(
        *(words[None].clone(), tall[None].clone(), dense, tall_dense, None, code),
        *(steps[None].clone(), tall_steps[None].clone()),
    )
    cuda.prepare(weights)
    tokens_of = torch.arange(intermediate, device="cuda", dtype=torch.int32)[:, None]
    for position in (tokens_of * 0, tokens_of * 0 + 1, tokens_of % 2):
        x = torch.zeros(intermediate, hidden, dtype=torch.bfloat16, device="cuda")
        expected = torch.empty(intermediate, hidden, device="cuda")
        for p in (0, 1):
            gate, up = kind.decode(words, p, steps).float().chunk(2)
            activation = torch.nn.functional.silu(gate) * up
            place = activation.abs().argmax(dim=1)
            own = (position[:, 0] == p).nonzero()[:, 0]
            x[own, place[own]] = 1
            factor = activation.gather(1, place[:, None]).bfloat16().float()
            expected[own] = (factor * kind.decode(tall, p, tall_steps).float().T)[own]
        for kernel, tokens in itertools.product(KERNELS, (16, intermediate)):
            for first in range(0, intermediate, tokens):
                some = slice(first, first + tokens)
                ones = torch.ones(tokens, 1, device="cuda")
                out = cuda.fused_experts(x[some], ones, position[some], weights, kernel=kernel)
                torch.testing.assert_close(out.float(), expected[some], rtol=2**-7, atol=1e-30)
