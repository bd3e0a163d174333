"""The op `puzzlemoe::fused_experts` as vLLM calls it: padding ids, torch.compile, and what PyTorch expects of an op."""

from __future__ import annotations

import pytest
import torch
from support.layers import Layer, generator, random_inputs, random_weights

from puzzlemoe_vllm.backends import ExpertWeights, reference
from puzzlemoe_vllm.ops import fused_experts

pytestmark = pytest.mark.without_vllm

LAYER = Layer(pairs=2, dense=1, top_k=2, hidden=64, intermediate=32)


@pytest.fixture
def weights() -> ExpertWeights:
    """Two pairs and a dense expert of six global ones; global expert 2 lives on another rank."""
    return random_weights(LAYER, generator(0), torch.tensor([0, 1, -1, 2, 3, 4], dtype=torch.int32))


def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, routing weights and ids, which cover all global experts."""
    x, routing, _ = random_inputs(LAYER, rows, generator(rows))
    return x, routing, (torch.arange(routing.numel()).view(routing.shape) % 6).int()


def test_padding_rows_are_zero_and_change_no_other_row(weights):
    x, routing, ids = batch(6)
    whole = fused_experts(x, routing, ids, weights)
    ids[[1, 4]] = -1
    padded = fused_experts(x, routing, ids, weights)
    others = [0, 2, 3, 5]
    assert whole[others].abs().amax(dim=1).gt(0).all()
    torch.testing.assert_close(padded[others], whole[others], rtol=2e-2, atol=1e-3)
    assert not padded[[1, 4]].any()


def test_one_padding_id_of_a_row_leaves_the_other(weights):
    x, routing, ids = batch(3)
    ids[:, 1] = -1
    out = fused_experts(x, routing, ids, weights)
    alone = fused_experts(x, routing[:, :1], ids[:, :1], weights)
    assert alone[0].any()
    torch.testing.assert_close(out, alone)


def test_a_batch_of_padding_only(weights):
    x, routing, ids = batch(5)
    assert not fused_experts(x, routing, torch.full_like(ids, -1), weights).any()


def test_inputs_are_left_alone(weights):
    inputs = batch(6)
    before = [tensor.clone() for tensor in inputs]
    out = fused_experts(*inputs, weights)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))
    assert out.data_ptr() != inputs[0].data_ptr()


def test_compiled_once_for_every_batch_size(weights):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x, routing, ids: fused_experts(x, routing, ids, weights) + 1, backend=backend, dynamic=True
    )
    for rows in (7, 2, 33):
        inputs = batch(rows)
        torch.testing.assert_close(compiled(*inputs), reference.fused_experts(*inputs, weights) + 1)
    assert len(graphs) == 1
    calls = [node for node in graphs[0].graph.nodes if "fused_experts" in str(node.target)]
    assert len(calls) == 1, "the op must be one opaque call"


def test_opcheck(weights):
    tensors = weights.w13_pairs, weights.w2_pairs, weights.w13_dense, weights.w2_dense, weights.expert_map
    torch.library.opcheck(torch.ops.puzzlemoe.fused_experts.default, (*batch(4), *tensors, weights.code))
