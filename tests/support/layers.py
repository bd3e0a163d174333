"""Random packed layers: what every test of a backend, of the op and of the plugin draws its weights and tokens from.

It needs neither vLLM nor a GPU; tensors lie where their generator is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from puzzlemoe_vllm.backends import ExpertWeights
from puzzlemoe_vllm.format.codes import PairCode, get_code


@dataclass(frozen=True)
class Layer:
    """The routed experts of one MoE layer on one rank: some pairs and some dense ones."""

    pairs: int
    dense: int
    top_k: int
    hidden: int
    intermediate: int
    code: str = "mask16"
    group_size: int | None = None

    @property
    def experts(self) -> int:
        return 2 * self.pairs + self.dense

    def coded(self, code: str, group_size: int | None = None) -> Layer:
        """The same layer in another code."""
        return dataclasses.replace(self, code=code, group_size=group_size)


MIXTRAL = Layer(pairs=4, dense=0, top_k=2, hidden=4096, intermediate=14336)
QWEN3 = Layer(pairs=64, dense=0, top_k=8, hidden=2048, intermediate=768)
DEEPSEEK = Layer(pairs=32, dense=0, top_k=6, hidden=2048, intermediate=1408)
QWEN15 = Layer(pairs=30, dense=0, top_k=4, hidden=2048, intermediate=1408)
GLM_AIR = Layer(pairs=64, dense=0, top_k=8, hidden=4096, intermediate=1408)
QWEN3_NEXT = Layer(pairs=256, dense=0, top_k=10, hidden=2048, intermediate=512)
DEEPSEEK_V3 = Layer(pairs=128, dense=0, top_k=8, hidden=7168, intermediate=2048)
MINIMAX_M2 = Layer(pairs=128, dense=0, top_k=8, hidden=3072, intermediate=1536)


def generator(seed: int, device: str = "cpu") -> Generator:
    return Generator(device).manual_seed(seed)


def random_words(code: PairCode, rows: int, columns: int, draw: Generator) -> Tensor:
    """Stored words of a pair of [rows, columns] matrices, of all states and signs; magnitudes are those of usual
    weights, or the steps' affair."""
    shape, device = (rows, columns), draw.device
    if code.has_steps:
        stored = code.words_shape(rows, columns)
        return torch.randint(0, 256, stored, generator=draw, device=device, dtype=code.dtype)
    state = torch.randint(0, 4, shape, generator=draw, device=device, dtype=torch.uint8)
    first, second = (torch.rand(shape, generator=draw, device=device) < 0.5 for _ in range(2))
    magnitude = torch.randn(shape, generator=draw, device=device).abs() * columns**-0.5
    return code.encode(state, (first, second), magnitude)


def random_steps(rows: int, columns: int, group_size: int, draw: Generator) -> Tensor:
    """bf16 steps [rows, groups] of usual size, no two alike."""
    steps = torch.rand(rows, columns // group_size, generator=draw, device=draw.device) + 0.5
    return (steps * columns**-0.5).bfloat16()


def random_dense(rows: int, columns: int, draw: Generator) -> Tensor:
    """A dense expert's bf16 matrix, of usual size."""
    return (torch.randn(rows, columns, generator=draw, device=draw.device) * columns**-0.5).bfloat16()


def random_weights(layer: Layer, draw: Generator, expert_map: Tensor | None = None) -> ExpertWeights:
    """A layer as it is loaded."""
    code, device = get_code(layer.code), draw.device
    w13, w2 = (2 * layer.intermediate, layer.hidden), (layer.hidden, layer.intermediate)

    def words(rows: int, columns: int) -> Tensor:
        out = torch.empty(layer.pairs, *code.words_shape(rows, columns), dtype=code.dtype, device=device)
        for matrix in out:
            matrix.copy_(random_words(code, rows, columns, draw))
        return out

    def steps(rows: int, columns: int) -> Tensor | None:
        if layer.group_size is None:
            return None
        return random_steps(layer.pairs * rows, columns, layer.group_size, draw).unflatten(0, (layer.pairs, rows))

    def dense(rows: int, columns: int) -> Tensor:
        return random_dense(layer.dense * rows, columns, draw).view(layer.dense, rows, columns)

    return ExpertWeights(
        w13_pairs=words(*w13),
        w2_pairs=words(*w2),
        w13_dense=dense(*w13),
        w2_dense=dense(*w2),
        expert_map=expert_map,
        code=layer.code,
        w13_steps=steps(*w13),
        w2_steps=steps(*w2),
    )


def random_inputs(
    layer: Layer, tokens: int, draw: Generator, experts: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x, topk_weights and topk_ids of random routing over `experts`, by default the layer's own."""
    x = torch.randn(tokens, layer.hidden, generator=draw, device=draw.device).bfloat16()
    scores = torch.rand(tokens, experts or layer.experts, generator=draw, device=draw.device)
    topk_weights, topk_ids = scores.softmax(-1).topk(layer.top_k)
    return x, topk_weights, topk_ids.int()


def copied(weights: ExpertWeights) -> ExpertWeights:
    """With tensors of its own."""
    values = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    return ExpertWeights(**{name: value.clone() if torch.is_tensor(value) else value for name, value in values.items()})
