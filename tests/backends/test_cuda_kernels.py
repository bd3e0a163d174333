"""The CUDA library against the float64 reference, on a GPU: every kernel with words of every code that it takes.

Under the sanitizer, where everything is slow: compute-sanitizer --tool memcheck python -m pytest -k test_sizes, and the
same with racecheck.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from support.kernel_cases import REASON, Case, cases, distance, draw, kernels, poison
from support.layers import (
    DEEPSEEK,
    DEEPSEEK_V3,
    DEEPSEEK_V3_RANK,
    GLM_AIR,
    MINIMAX_M2,
    MIXTRAL,
    QWEN3,
    QWEN3_NEXT,
    QWEN15,
    Layer,
)
from torch import Tensor

from puzzlemoe_vllm.backends import ExpertWeights, cuda
from puzzlemoe_vllm.backends.cuda_self_check import on_device
from puzzlemoe_vllm.format.codes import CODES, TrellisCode, get_code
from puzzlemoe_vllm.format.codes.base import EntrywiseCode

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

MODELS = (
    MIXTRAL,
    QWEN3,
    DEEPSEEK,
    QWEN15,
    MIXTRAL.coded("angle16"),
    *(MIXTRAL.coded(code, 128) for code in ("angle8", "angle6", "mask6", "trellis8", "trellis5", "trellis3")),
    QWEN3.coded("angle8", 128),
    QWEN3.coded("trellis6", 64),
    DEEPSEEK.coded("trellis4", 128),
)
SMALL = (
    Layer(pairs=3, dense=2, top_k=2, hidden=256, intermediate=176),
    Layer(3, 2, 2, 256, 176, "angle16"),
    Layer(3, 2, 2, 256, 224, "angle8", 32),
    Layer(3, 2, 2, 256, 192, "angle6", 64),
    Layer(3, 2, 2, 384, 128, "mask6", 128),
    Layer(3, 2, 2, 256, 224, "trellis6", 32),
    Layer(3, 2, 2, 384, 128, "trellis3", 128),
    # Without dense experts.
    Layer(4, 0, 2, 256, 176, "angle16"),
    Layer(4, 0, 2, 256, 224, "angle8", 32),
    Layer(4, 0, 2, 384, 128, "angle6", 128),
    Layer(4, 0, 2, 256, 192, "trellis5", 64),
)
SMALL_IN_E4M3 = (
    Layer(3, 2, 2, 256, 384, "angle8", 128),
    Layer(3, 0, 2, 320, 192, "angle8", 64),
    Layer(3, 2, 2, 352, 224, "angle8", 32),
    Layer(3, 2, 2, 384, 128, "angle6", 128),
    Layer(3, 0, 2, 192, 448, "angle6", 64),
    Layer(3, 2, 2, 32, 96, "angle6", 32),
)
EDGES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 2049, 4097)

of_all = pytest.mark.parametrize("case", cases(*SMALL) + cases(*SMALL_IN_E4M3, fp8=True), ids=str)
"""Small layers by every kernel."""

by_the_table = pytest.mark.parametrize("case", [Case(layer) for layer in SMALL], ids=str)


@pytest.mark.parametrize("case", cases(*MODELS), ids=str)
def test_real_shapes(case):
    for tokens in (1, 3, 33, 257):
        case.check(case.inputs(tokens))


LARGE = (
    GLM_AIR,
    GLM_AIR.coded("angle8", 128),
    QWEN3_NEXT,
    QWEN3_NEXT.coded("trellis6", 64),
    MINIMAX_M2.coded("angle8", 128),
    MINIMAX_M2.coded("trellis4", 128),
    DEEPSEEK_V3_RANK,
    DEEPSEEK_V3_RANK.coded("angle8", 128),
)


@pytest.mark.parametrize("layer", LARGE, ids=str)
def test_shapes_of_large_models(layer):
    """A token, a few and a prefill; what is expected is computed once, of the experts that some token chose."""
    experts, expert_map = layer.experts, None
    if layer.hidden == DEEPSEEK_V3_RANK.hidden:
        experts = DEEPSEEK_V3.experts
        expert_map = torch.arange(experts, dtype=torch.int32, device="cuda") - layer.experts
        expert_map = expert_map.where((expert_map >= 0) & (expert_map < layer.experts), -1)
    for tokens in (1, 20, 300):
        inputs = Case(layer).inputs(tokens, experts)
        expected = Case(layer).expected(inputs, expert_map)
        for case in cases(layer):
            poison()
            assert distance(case.multiply(inputs, expert_map), expected) < case.tolerance(tokens), case.kernel


@of_all
def test_token_counts(case):
    for tokens in EDGES:
        case.check(case.inputs(tokens))


@pytest.mark.parametrize(
    "case",
    cases(
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
    ),
    ids=str,
)
def test_sizes(case):
    for tokens in (1, 17, 200):
        case.check(case.inputs(tokens))


@pytest.mark.parametrize(
    "case",
    cases(
        *(Layer(*of, 2, 128, 96, *code) for of in ((0, 3), (2, 0)) for code in ((), ("angle8", 32), ("trellis4", 32)))
    ),
    ids=str,
)
def test_only_dense_and_only_pairs(case):
    case.check(case.inputs(40))


@of_all
def test_one_expert_takes_all(case):
    for expert in (0, 3, case.layer.experts - 1):
        for tokens in (9, 32, 256, 300, 1300):
            x, topk_weights, topk_ids = case.inputs(tokens)
            case.check((x, topk_weights, topk_ids.fill_(expert)))


@of_all
def test_only_position_one_is_active(case):
    for tokens in (1, 50):
        x, topk_weights, topk_ids = case.inputs(tokens)
        case.check((x, topk_weights, (topk_ids % 3) * 2 + 1))


@of_all
def test_skipped_rows_are_zero(case):
    for tokens in (1, 5, 300, 4000):
        x, topk_weights, topk_ids = case.inputs(tokens)
        poison()
        assert not case.multiply((x, topk_weights, torch.full_like(topk_ids, -1))).any()
        topk_ids[torch.rand(topk_ids.shape, device="cuda") < 0.5] = -1
        topk_ids[0] = -1
        case.check((x, topk_weights, topk_ids))


@of_all
def test_expert_map(case):
    experts = case.layer.experts
    expert_map = torch.full((20,), -1, dtype=torch.int32, device="cuda")
    expert_map[6 : 6 + experts] = torch.arange(experts, dtype=torch.int32, device="cuda")
    for tokens in (1, 90, 900):
        case.check(case.inputs(tokens, experts=20), expert_map)


# Qwen3-Next's and Kimi-K2's numbers of experts, all in pairs; a quarter saved, in which most are dense.
@pytest.mark.parametrize(
    "case", cases(*(Layer(*of, 64, 32) for of in ((256, 0, 10), (192, 0, 8), (200, 112, 8)))), ids=str
)
def test_many_experts(case):
    for tokens in (1, 100, 3000):
        case.check(case.inputs(tokens))


@by_the_table
def test_long_batches(case):
    """The last is more than one call."""
    for tokens in (512, 513, 4097, 65536):
        case.check(case.inputs(tokens))


@by_the_table
def test_no_tokens(case):
    assert case.multiply(case.inputs(0)).shape == (0, case.layer.hidden)


@of_all
def test_equal_bits_for_equal_inputs(case):
    for tokens in (2, 20, 400):
        inputs = case.inputs(tokens)
        outs = [case.multiply(inputs) for _ in range(5)]
        assert all(torch.equal(outs[0], out) for out in outs[1:])


@of_all
def test_graphs_on_two_streams(case):
    inputs = [case.inputs(tokens) for tokens in (3, 8)]
    expected = [case.multiply(given) for given in inputs]
    graphs, outs = [torch.cuda.CUDAGraph() for _ in inputs], []
    for graph, given in zip(graphs, inputs, strict=True):
        with torch.cuda.graph(graph):
            outs.append(case.multiply(given))
    # Blocks of the more urgent one come first, wherever one of the other ends.
    streams = [torch.cuda.Stream(priority=-number) for number, _ in enumerate(inputs)]
    torch.cuda.synchronize()
    for _ in range(100):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, right) for out, right in zip(outs, expected, strict=True))


@pytest.mark.parametrize(
    "case", cases(QWEN3, QWEN3.coded("angle8", 128), QWEN3.coded("trellis6", 64), MIXTRAL.coded("angle8", 128)), ids=str
)
def test_many_layers_one_after_another(case):
    """Thousands of launches, cut between blocks elsewhere in each, on the same memory: what one leaves must not reach
    the next."""
    inputs = [case.inputs(tokens) for tokens in (1, 3, 1, 2)]
    expected = [case.multiply(given) for given in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [case.multiply(given) for given in inputs]
    for _ in range(20):
        for _ in range(100):
            graph.replay()
        assert all(torch.equal(out, right) for out, right in zip(outs, expected, strict=True))


@by_the_table
def test_long_batches_in_several_calls(case, monkeypatch):
    monkeypatch.setattr(cuda, "CALL_TOKENS", 100)
    for tokens in (100, 257):
        case.check(case.inputs(tokens))


@of_all
def test_graph_replay_with_changing_routing(case):
    for tokens in (4, 3000):
        static = case.inputs(tokens)
        case.multiply(static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = case.multiply(static)
        for _ in range(3):
            inputs = case.inputs(tokens)
            inputs[2][torch.rand(inputs[2].shape, device="cuda") < 0.3] = -1
            for held, fresh in zip(static, inputs, strict=True):
                held.copy_(fresh)
            out.fill_(float("nan"))
            graph.replay()
            assert case.error(out, inputs) < case.tolerance(tokens)


@of_all
def test_two_streams(case):
    streams = [torch.cuda.Stream() for _ in range(4)]
    inputs = [case.inputs(tokens) for tokens in (150, 150, 3, 8)]
    case.multiply(inputs[0])  # the weights are there before the streams begin
    torch.cuda.synchronize()
    outs: list[list[Tensor]] = [[] for _ in streams]
    for _ in range(20):
        for stream, given, kept in zip(streams, inputs, outs, strict=True):
            with torch.cuda.stream(stream):
                kept.append(case.multiply(given))
    torch.cuda.synchronize()
    for given, kept in zip(inputs, outs, strict=True):
        assert case.error(kept[0], given) < case.tolerance(len(given[0]))
        assert all(torch.equal(kept[0], out) for out in kept)


@by_the_table
def test_dispatch_table_serves_every_load(case):
    for tokens in (1, 20, 40, 80, 160, 900):
        case.check(case.inputs(tokens))


@by_the_table
def test_every_device_of_the_process(case):
    """Not the current one alone, where there are several."""
    inputs = case.inputs(40)
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        out = cuda.fused_experts(*(held.to(device) for held in inputs), on_device(case.weights()[1], device))
        assert out.device == device
        assert case.error(out.to(inputs[0].device), inputs) < case.tolerance(len(inputs[0]))


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
        for kernel in kernels(code):
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
        largest = expected.abs().max().item()
        for kernel, tokens in itertools.product(kernels(code), (16, intermediate)):
            # Sums of bytes are too large by 62 times the tokens, which is taken off in float32: zero is not exact.
            atol = 1e-6 * largest if kernel == "sm90_imma8" else 1e-30
            for first in range(0, intermediate, tokens):
                some = slice(first, first + tokens)
                ones = torch.ones(tokens, 1, device="cuda")
                out = cuda.fused_experts(x[some], ones, position[some], weights, kernel=kernel)
                torch.testing.assert_close(out.float(), expected[some], rtol=2**-7, atol=atol)
