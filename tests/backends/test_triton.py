"""The Triton backend against the reference in float64: compiled where a GPU is, else under Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

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
    Layer,
    generator,
    random_inputs,
    random_weights,
)
from support.triton_device import (
    DEVICE,
    GPU,
    INTERPRETED,
    compiles,
    machine_code,
    on_a_gpu,
    run_interpreted,
    runs,
    starts_the_interpreter,
)
from torch import Tensor

from puzzlemoe_vllm.backends import ExpertWeights, reference
from puzzlemoe_vllm.format.codes import Decoder, get_code

TOLERANCE = 1.2e-2 if INTERPRETED else 6e-3  # the interpreter truncates to bf16 where a GPU rounds

if GPU or INTERPRETED:
    import triton
    import triton.language as tl

    from puzzlemoe_vllm.backends import triton as backend
    from puzzlemoe_vllm.backends.triton.decode import decode
    from puzzlemoe_vllm.backends.triton.route import route

    @triton.jit
    def decode_kernel(words, out, POSITION: tl.constexpr, DECODER: tl.constexpr, BLOCK: tl.constexpr):
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        weight = decode(tl.load(words + index), POSITION, None, None, DECODER)
        tl.store(out + index, weight.to(tl.float32))


@starts_the_interpreter
def test_under_the_interpreter():
    run_interpreted(__file__)


TINY = Layer(pairs=2, dense=0, top_k=2, hidden=64, intermediate=32)


def make_weights(layer: Layer) -> ExpertWeights:
    return random_weights(layer, generator(100, DEVICE))


def make_routing(layer: Layer, tokens: int, experts: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return random_inputs(layer, tokens, generator(seed + 200, DEVICE), experts)


def check(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, weights: ExpertWeights) -> Tensor:
    """The backend's output, compared with the reference; its inputs must come out unchanged."""
    before = x.clone(), topk_weights.clone(), topk_ids.clone()
    out = backend.fused_experts(x, topk_weights, topk_ids, weights)
    expected = reference.fused_experts(x.double(), topk_weights, topk_ids, weights)
    assert out.dtype == torch.bfloat16 and out.shape == x.shape
    assert (out.double() - expected).norm() <= TOLERANCE * expected.norm()
    skipped = (reference.local_ids(topk_ids, weights.expert_map) < 0).all(-1)
    assert (out[skipped] == 0).all()
    for tensor, copy in zip((x, topk_weights, topk_ids), before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)
    return out


@runs
@pytest.mark.parametrize("position", [0, 1])
def test_every_word_decodes_as_the_code_says(position):
    words = torch.arange(-(2**15), 2**15, device=DEVICE).to(torch.int16)
    out = torch.empty(2**16, device=DEVICE)
    decode_kernel[(16,)](words, out, position, int(Decoder.MASK16), BLOCK=4096)
    expected = get_code("mask16").decode(words, position).float()
    kept = (words.int() >> (13 - position)) & 1 == 1
    assert torch.equal(out[kept] * 2.0**-16, expected[kept])
    assert (out[~kept].abs() < 1e-25).all()


@runs
@pytest.mark.parametrize("position", [0, 1])
def test_every_angle16_word_decodes_as_the_code_says(position):
    words = torch.arange(-(2**15), 2**15, device=DEVICE).to(torch.int16)
    out = torch.empty(2**16, device=DEVICE)
    decode_kernel[(16,)](words, out, position, int(Decoder.ANGLE16), BLOCK=4096)
    # The interpreter truncates to bf16 where a GPU rounds.
    torch.testing.assert_close(out, get_code("angle16").decode(words, position).float(), rtol=2**-7, atol=0)


# Around the tile sizes of all three regimes: 4 experts, so M tokens of top 2 are M / 2 per expert.
@runs
@pytest.mark.parametrize("tokens", [1, 2, 15, 17, 33, 70, 129, 257])
def test_tokens(tokens):
    check(*make_routing(TINY, tokens, 4), make_weights(TINY))


@runs
@pytest.mark.parametrize("hidden, intermediate", [(16, 16), (80, 96), (144, 176), (128, 352), (48, 1040)])
@pytest.mark.parametrize("tokens", [5, 140])
def test_any_multiple_of_16(hidden, intermediate, tokens):
    layer = replace(TINY, hidden=hidden, intermediate=intermediate)
    check(*make_routing(layer, tokens, 4), make_weights(layer))


@runs
@pytest.mark.parametrize(
    "code, group_size",
    [
        *(("angle16", None), ("angle8", 32), ("angle8", 128), ("angle6", 64), ("mask6", 32)),
        *(("trellis8", 32), ("trellis6", 64), ("trellis5", 128), ("trellis4", 32), ("trellis3", 64)),
    ],
)
@pytest.mark.parametrize("tokens", [3, 70, 400])
def test_every_code(code, group_size, tokens):
    layer = Layer(2, 1, 2, 128 if group_size is None else 2 * group_size, 128, code, group_size)
    check(*make_routing(layer, tokens, 5), make_weights(layer))


@runs
@pytest.mark.parametrize("pairs, dense", [(3, 2), (1, 3), (0, 4)])
@pytest.mark.parametrize("tokens", [3, 60, 400])
def test_dense_experts(pairs, dense, tokens):
    layer = replace(TINY, pairs=pairs, dense=dense)
    check(*make_routing(layer, tokens, 2 * pairs + dense), make_weights(layer))


@runs
@pytest.mark.parametrize("tokens", [4, 300])
def test_skewed_routing(tokens):
    weights = make_weights(TINY)
    x, topk_weights, topk_ids = make_routing(TINY, tokens, 4)
    one_expert = torch.tensor([2, -1], dtype=torch.int32, device=DEVICE).expand(tokens, 2)
    check(x, topk_weights, one_expert, weights)
    only_position_1 = topk_ids | 1
    check(x, topk_weights, only_position_1, weights)
    all_padding = torch.full_like(topk_ids, -1)
    assert (check(x, topk_weights, all_padding, weights) == 0).all()
    some_padding = topk_ids.where(topk_ids != 1, -1).long()
    check(x, topk_weights.where(some_padding >= 0, float("nan")), some_padding, weights)


@runs
@pytest.mark.parametrize("tokens", [4, 300])
def test_expert_map(tokens):
    layer = replace(TINY, pairs=1, dense=1)
    expert_map = torch.tensor([-1, 2, -1, 0, 1, -1, -1, -1], dtype=torch.int32, device=DEVICE)
    weights = replace(make_weights(layer), expert_map=expert_map)
    x, topk_weights, topk_ids = make_routing(layer, tokens, 8)
    topk_ids[0] = -1
    topk_ids[1] = torch.tensor([0, 7])
    check(x, topk_weights, topk_ids, weights)


# Qwen3-Next's and Kimi-K2's numbers of experts, and those of a rank that has a share of them; a quarter saved.  Up to
# 128 slots one program counts and aligns; what 12 tokens with top 10 have are few of these, what 13 have one too many.
@runs
@pytest.mark.parametrize("pairs, dense, top_k", [(256, 0, 10), (128, 256, 10), (192, 0, 8), (96, 192, 8), (0, 384, 8)])
@pytest.mark.parametrize("on_a_rank", [False, True])
def test_blocks_of_many_experts(pairs, dense, top_k, on_a_rank):
    local = 2 * pairs + dense
    total = 2 * local if on_a_rank else local
    expert_map = None
    if on_a_rank:
        expert_map = torch.full((total,), -1, dtype=torch.int32, device=DEVICE)
        expert_map[local // 2 : local // 2 + local] = torch.arange(local, dtype=torch.int32, device=DEVICE)
    for shared in {0, pairs}:
        for tokens, rows in ((1, 16), (12, 16), (13, 16), (100, 16), (300, 64)):
            scores = torch.rand(tokens, total, generator=generator(tokens, DEVICE), device=DEVICE)
            topk_ids = scores.topk(top_k).indices.int()
            topk_ids[tokens // 2, 3] = -1
            check_blocks(topk_ids, expert_map, local, shared, rows)


def check_blocks(topk_ids: Tensor, expert_map: Tensor | None, experts: int, shared_pairs: int, rows: int) -> None:
    """Every slot with a local expert is in one block, at a position that has its expert; no block has too many."""
    blocks, most, slot_expert = route(topk_ids, expert_map, experts, shared_pairs, rows)
    expected = reference.local_ids(topk_ids, expert_map).flatten()
    assert torch.equal(slot_expert.long(), expected)
    order, found = blocks.order.tolist(), {}
    used = blocks.used.item()
    assert used <= most
    for expert, first, count, partner_first, partner_count in blocks.table[:used].tolist():
        parts = [(expert, first, count)]
        if expert < 2 * shared_pairs:
            assert expert % 2 == 0
            parts.append((expert + 1, partner_first, partner_count))
        assert any(size > 0 for _, _, size in parts)
        for owner, start, size in parts:
            assert size <= rows
            for slot in order[start : start + max(size, 0)]:
                assert slot not in found
                found[slot] = owner
    assert found == {slot: expert for slot, expert in enumerate(expected.tolist()) if expert >= 0}


@runs
def test_many_experts():
    layer = Layer(pairs=240, dense=32, top_k=10, hidden=16, intermediate=16)
    check(*make_routing(layer, 13, layer.experts), make_weights(layer))


@runs
@pytest.mark.parametrize("tokens", [5, 140])
def test_scratch_is_never_read_before_it_is_written(tokens, monkeypatch):
    layer = replace(TINY, pairs=1, dense=1, intermediate=1040)
    weights = make_weights(layer)
    x, topk_weights, topk_ids = make_routing(layer, tokens, 3)
    topk_ids[::3, 0] = -1
    clean = backend.fused_experts(x, topk_weights, topk_ids, weights)
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -(2**30))

    monkeypatch.setattr(torch, "empty", lambda *shape, **options: poison(empty(*shape, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda tensor: poison(empty_like(tensor)))
    assert torch.equal(backend.fused_experts(x, topk_weights, topk_ids, weights), clean)


@runs
def test_chunks_of_tokens(monkeypatch):
    monkeypatch.setattr(backend, "CHUNK", 16)
    check(*make_routing(TINY, 37, 4), make_weights(TINY))


@runs
def test_no_tokens():
    out = backend.fused_experts(*make_routing(TINY, 0, 4), make_weights(TINY))
    assert out.shape == (0, TINY.hidden)


@runs
def test_refuses_what_it_would_misread():
    x, topk_weights, topk_ids = make_routing(TINY, 3, 4)
    weights = make_weights(TINY)
    with pytest.raises(TypeError, match="bfloat16"):
        backend.fused_experts(x.float(), topk_weights, topk_ids, weights)
    with pytest.raises(TypeError, match=r"angle8 words are torch\.uint8"):
        backend.fused_experts(x, topk_weights, topk_ids, replace(weights, code="angle8"))


@compiles
@pytest.mark.parametrize(
    "code, group_size", [("mask16", None), ("angle16", None), ("angle8", 128), ("mask6", 32), ("trellis5", 64)]
)
def test_compiles_for_hopper(code, group_size):
    pytest.importorskip("triton")
    from puzzlemoe_vllm.backends.triton.gemm import Projection, Storage, choose_tiles, down_kernel
    from puzzlemoe_vllm.backends.triton.route import Blocks

    pair_code = get_code(code)
    word, steps = "*i16" if pair_code.dtype == torch.int16 else "*u8", None if group_size is None else "*bf16"
    types = dict.fromkeys(down_kernel.arg_names, "i32")
    types |= {"hidden": "*bf16", "down": "*fp32", "word_table": "*bf16"}
    types |= {"projection": Projection(word, steps, "*bf16"), "blocks": Blocks("*i32", "*i32", "*i32")}
    constants = {
        "STORAGE": Storage(int(pair_code.decoder), pair_code.bits, group_size, True, True),
        "TILES": choose_tiles(1, 8),
    }
    constants |= {"word_table": None} if pair_code.word_table(torch.device("cpu")) is None else {}
    assert machine_code(down_kernel, types, constants, 90)


@on_a_gpu
@pytest.mark.parametrize(
    "name, layer",
    [
        ("mixtral", MIXTRAL),
        ("qwen3", QWEN3),
        ("deepseek", DEEPSEEK),
        ("angle8", QWEN3.coded("angle8", 128)),
        ("trellis6", QWEN3.coded("trellis6", 64)),
        ("trellis3", MIXTRAL.coded("trellis3", 128)),
        ("glm-4.5-air", GLM_AIR.coded("angle8", 128)),
        ("qwen3-next", QWEN3_NEXT),
        ("minimax-m2", MINIMAX_M2.coded("angle8", 128)),
        ("deepseek-v3", replace(DEEPSEEK_V3, pairs=DEEPSEEK_V3.pairs // 8)),  # an expert-parallel rank's of eight
    ],
)
def test_real_shapes(name, layer):
    weights = make_weights(layer)
    for tokens in (1, 16, 100, 513, 2048):
        x, topk_weights, topk_ids = make_routing(layer, tokens, weights.total)
        out = check(x, topk_weights, topk_ids, weights)
        for _ in range(5):
            assert torch.equal(backend.fused_experts(x, topk_weights, topk_ids, weights), out)


@on_a_gpu
@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_graph_replay_with_changing_routing(tokens):
    weights = make_weights(QWEN3)
    x, topk_weights, topk_ids = make_routing(QWEN3, tokens, weights.total)
    backend.fused_experts(x, topk_weights, topk_ids, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = backend.fused_experts(x, topk_weights, topk_ids, weights)
    for seed in (1, 2):
        routing = make_routing(QWEN3, tokens, weights.total, seed)
        for static, fresh in zip((x, topk_weights, topk_ids), routing, strict=True):
            static.copy_(fresh)
        topk_ids[::5] = -1
        graph.replay()
        assert torch.equal(out, check(x, topk_weights, topk_ids, weights))
