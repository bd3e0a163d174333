"""What the plugin relies on in vLLM's RoutedExperts, tested without a model, a GPU or vLLM's binaries.

Run by test_vllm_releases.py, once per vLLM release.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import vllm
from support.layers import generator, random_dense, random_steps, random_words
from torch import Tensor
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

import puzzlemoe_vllm
from puzzlemoe_vllm.config import PuzzleMoEConfig
from puzzlemoe_vllm.format.codes import get_code
from puzzlemoe_vllm.format.layout import LayoutError

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, GROUP = 6, 64, 64, 3, 32

PREFIX = "model.layers.0.mlp.experts"
PROJECTIONS = {
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}


@dataclass(frozen=True)
class Ranks:
    """Ranks that share a layer: by splitting every expert (tensor parallel), or by splitting the list of experts."""

    count: int
    expert_parallel: bool = False

    def parallel_config(self, rank: int, **fields) -> FusedMoEParallelConfig:
        tensor, expert = ((self.count, rank), (1, 0)) if not self.expert_parallel else ((1, 0), (self.count, rank))
        settings = {
            "tp_size": tensor[0],
            "tp_rank": tensor[1],
            "ep_size": expert[0],
            "ep_rank": expert[1],
            "pcp_size": 1,
            "pcp_rank": 0,
            "dp_size": 1,
            "dp_rank": 0,
            "sp_size": 1,
            "use_ep": self.expert_parallel,
            "all2all_backend": "allgather_reducescatter",
            "enable_eplb": False,
        }
        return FusedMoEParallelConfig(**(settings | fields))


@pytest.fixture(scope="module", autouse=True)
def vllm_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        yield


@dataclass(frozen=True)
class Layer:
    """A packed layer: `merged` of its experts in pairs, and the tensors named as models hand them to RoutedExperts.

    centres: for each expert the one that serves in its place.
    """

    merged: int
    tensors: dict[str, Tensor]
    code: str = "mask16"
    centres: tuple[int, ...] | None = None

    @property
    def group_size(self) -> int | None:
        return GROUP if get_code(self.code).has_steps else None

    def weight(self, expert: int, projection: str) -> Tensor:
        """An expert's reconstructed weight in float64."""
        if self.centres:
            expert = self.centres[expert]
        if expert >= self.merged:
            return self.tensors[f"{expert}.{projection}.weight"].double()
        pair = f"{expert & ~1}.{projection}"
        words, steps = self.tensors[f"{pair}.puzzle"], self.tensors.get(f"{pair}.puzzle_grid")
        return get_code(self.code).decode(words, expert & 1, steps).double()


def random_layer(merged: int, code: str = "mask16") -> Layer:
    pair_code, draw = get_code(code), generator(0)
    tensors = {}
    for name, shape in PROJECTIONS.items():
        for leader in range(0, merged, 2):
            tensors[f"{leader}.{name}.puzzle"] = random_words(pair_code, *shape, draw)
            if pair_code.has_steps:
                tensors[f"{leader}.{name}.puzzle_grid"] = random_steps(*shape, GROUP, draw)
        for expert in range(merged, EXPERTS):
            tensors[f"{expert}.{name}.weight"] = random_dense(*shape, draw)
    return Layer(merged, tensors, code)


def clustered_layer(centres: tuple[int, ...]) -> Layer:
    dense = random_layer(merged=0).tensors
    kept = {name: tensor for name, tensor in dense.items() if int(name.split(".")[0]) in centres}
    return Layer(0, kept, centres=centres)


@pytest.fixture(scope="module")
def layer() -> Layer:
    """Of two expert-parallel ranks with three experts each, both hold the pair of experts 2 and 3."""
    return random_layer(merged=4)


def routed_experts(
    parallel: FusedMoEParallelConfig,
    merged: int = 4,
    code: str = "mask16",
    group_size: int | None = None,
    centres: tuple[int, ...] | None = None,
) -> RoutedExperts:
    """One rank's layer, as vLLM's FusedMoE factory builds it."""
    manager = ExpertMapManager(
        max_num_batched_tokens=64,
        top_k=TOP_K,
        global_num_experts=EXPERTS,
        num_redundant_experts=0,
        num_expert_group=None,
        moe_parallel_config=parallel,
        placement_strategy="linear",
        enable_eplb=parallel.enable_eplb,
    )
    config = FusedMoEConfig(
        num_experts=EXPERTS,
        experts_per_token=TOP_K,
        hidden_dim=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=manager.local_num_experts,
        num_logical_experts=EXPERTS,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
    )
    merging = {"clusters": {"0": list(centres)}} if centres else {"merged_experts": {"0": merged}}
    quantization = PuzzleMoEConfig.from_config({"code": code, "group_size": group_size} | merging)
    return RoutedExperts(PREFIX, torch.bfloat16, config, quantization, manager)


def loaded(parallel: FusedMoEParallelConfig, layer: Layer) -> RoutedExperts:
    module = routed_experts(parallel, layer.merged, layer.code, layer.group_size, layer.centres)
    list(module.load_weights(layer.tensors.items()))
    module.quant_method.process_weights_after_loading(module)
    return module


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """x, routing weights and global ids of every expert; row 2 is padding and row 5 has one padding id."""
    draw = generator(1)
    x = torch.randn(8, HIDDEN, generator=draw).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS, generator=draw)[:TOP_K] for _ in x]).int()
    ids[2], ids[5, 1] = -1, -1
    return x, torch.rand(8, TOP_K, generator=draw), ids


def exact(layer: Layer, x: Tensor, routing: Tensor, ids: Tensor) -> Tensor:
    """The layer's output in float64, expert by expert."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row, chosen in enumerate(ids.tolist()):
        for choice, expert in enumerate(chosen):
            if expert >= 0:
                gate, up, down = (layer.weight(expert, name) for name in PROJECTIONS)
                hidden = F.silu(gate @ x[row].double()) * (up @ x[row].double())
                out[row] += routing[row, choice].double() * (down @ hidden)
    return out


def test_this_is_the_release_under_test():
    assert vllm.__file__.startswith(os.environ["VLLM_UNDER_TEST"])


def test_registering_twice():
    puzzlemoe_vllm.register()
    puzzlemoe_vllm.register()
    assert QUANTIZATION_METHODS.count("puzzlemoe") == 1
    assert get_quantization_config("puzzlemoe") is PuzzleMoEConfig


# With 2 merged experts the second expert-parallel rank holds no pair, with 6 no rank holds a dense expert.
@pytest.mark.parametrize("merged", [2, 4, 6])
@pytest.mark.parametrize("ranks", [Ranks(1), Ranks(2), Ranks(2, expert_parallel=True)], ids=str)
def test_sum_over_ranks(ranks, merged):
    check_sum_over_ranks(ranks, random_layer(merged))


@pytest.mark.parametrize("code", ["angle16", "angle8", "angle6", "mask6"])
@pytest.mark.parametrize("ranks", [Ranks(2), Ranks(2, expert_parallel=True)], ids=str)
def test_sum_over_ranks_with_other_codes(ranks, code):
    check_sum_over_ranks(ranks, random_layer(4, code))


# Of two expert-parallel ranks both have centres, the second has none, and the first.
@pytest.mark.parametrize("centres", [(0, 4, 0, 0, 4, 4), (1, 1, 2, 2, 1, 2), (5, 5, 5, 5, 5, 5)])
@pytest.mark.parametrize("ranks", [Ranks(1), Ranks(2), Ranks(2, expert_parallel=True)], ids=str)
def test_sum_over_ranks_with_clusters(ranks, centres):
    check_sum_over_ranks(ranks, clustered_layer(centres))


def test_a_rank_allocates_the_centres_among_its_experts_only():
    layer = clustered_layer((0, 4, 0, 0, 4, 5))
    modules = [loaded(Ranks(2, expert_parallel=True).parallel_config(rank), layer) for rank in (0, 1)]
    assert [(len(module.w13_puzzle), len(module.w13_weight)) for module in modules] == [(0, 1), (0, 2)]
    assert len(loaded(Ranks(1).parallel_config(0), layer).w13_weight) == 3


def test_clusters_of_another_model_are_refused():
    config = PuzzleMoEConfig.from_config({"code": "mask16", "clusters": {"1": [0, 0, 2]}})
    for experts, layers in ((4, 2), (3, 1)):
        model = SimpleNamespace(num_experts=experts, num_hidden_layers=layers)
        with pytest.raises(LayoutError, match=f"clusters of 3 experts in layer 1, .* {layers} layers of {experts}"):
            config.maybe_update_config("model", model)
    config.maybe_update_config("model", SimpleNamespace(num_experts=3, num_hidden_layers=2))


def check_sum_over_ranks(ranks: Ranks, layer: Layer) -> None:
    x, routing, ids = batch()
    modules = [loaded(ranks.parallel_config(rank), layer) for rank in range(ranks.count)]
    parts = [module.forward_modular(x, routing, ids) for module in modules]
    out, want = sum(part.double() for part in parts), exact(layer, x, routing, ids)
    assert (out - want).norm() < 0.01 * want.norm()
    assert want[5].any() and not want[2].any() and not out[2].any()


def test_a_rank_allocates_its_own_experts_only(layer):
    first, second = (loaded(Ranks(2, expert_parallel=True).parallel_config(rank), layer) for rank in (0, 1))
    sizes = [(len(module.w13_puzzle), len(module.w13_weight)) for module in (first, second)]
    assert sizes == [(2, 0), (1, 2)]
    halves = loaded(Ranks(2).parallel_config(1), layer)
    assert halves.w13_puzzle.shape == (2, INTERMEDIATE, HIDDEN)
    assert halves.w2_weight.shape == (2, HIDDEN, INTERMEDIATE // 2)


def test_steps_are_split_with_the_columns():
    layer = random_layer(4, "angle8")
    for rank in range(2):
        module = loaded(Ranks(2).parallel_config(rank), layer)
        assert torch.equal(module.w2_puzzle_grid[0], layer.tensors["0.down_proj.puzzle_grid"][:, rank : rank + 1])
        up = layer.tensors["2.up_proj.puzzle_grid"].chunk(2)[rank]
        assert torch.equal(module.w13_puzzle_grid[1, INTERMEDIATE // 2 :], up)


def test_a_split_that_cuts_a_group_is_refused_with_advice():
    message = r"group size 64, .*compress again with --group-size 32, or lower --tensor-parallel-size"
    with pytest.raises(ValueError, match=message):
        routed_experts(Ranks(2).parallel_config(0), 4, "angle8", 64)
    with pytest.raises(ValueError, match=r"columns share a step: lower --tensor-parallel-size"):
        routed_experts(Ranks(4).parallel_config(0), 4, "angle8", 64)
    routed_experts(Ranks(2, expert_parallel=True).parallel_config(0), 4, "angle8", 64)


def test_padding_only(layer):
    x, routing, ids = batch()
    module = loaded(Ranks(1).parallel_config(0), layer)
    assert not module.forward_modular(x, routing, torch.full_like(ids, -1)).any()


def test_missing_words(layer):
    rest = {name: tensor for name, tensor in layer.tensors.items() if name != "2.down_proj.puzzle"}
    with pytest.raises(LayoutError, match="w2_puzzle w2 of expert 2"):
        loaded(Ranks(1).parallel_config(0), Layer(layer.merged, rest))


def test_missing_steps():
    layer = random_layer(4, "angle8")
    rest = {name: tensor for name, tensor in layer.tensors.items() if name != "2.down_proj.puzzle_grid"}
    with pytest.raises(LayoutError, match="w2_puzzle_grid w2 of expert 2"):
        loaded(Ranks(1).parallel_config(0), Layer(layer.merged, rest, layer.code))


def test_a_reload_must_be_complete_again(layer):
    module = loaded(Ranks(1).parallel_config(0), layer)
    list(module.load_weights(list(layer.tensors.items())[:-1]))
    with pytest.raises(LayoutError, match="1 expert tensors are missing"):
        module.quant_method.process_weights_after_loading(module)


def test_expert_load_balancing_is_refused():
    with pytest.raises(NotImplementedError, match="EPLB"):
        routed_experts(Ranks(2, expert_parallel=True).parallel_config(0, enable_eplb=True))


def test_all2all_backend_that_needs_modular_kernels_is_refused():
    ranks = Ranks(2, expert_parallel=True)
    fields = {"dp_size": 2, "all2all_backend": "deepep_low_latency"}
    with pytest.raises(ValueError, match=r"deepep_low_latency.*allgather_reducescatter"):
        routed_experts(ranks.parallel_config(0, **fields))
    routed_experts(ranks.parallel_config(0, dp_size=2))
