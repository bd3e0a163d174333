"""What the plugin relies on in vLLM's RoutedExperts, tested without a model, a GPU or vLLM's binaries.

Run by test_vllm_releases.py, once per vLLM release.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import vllm
from support.layers import generator, random_dense, random_steps, random_words
from torch import Tensor
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.layers.quantization import fp8 as vllm_fp8
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

import puzzlemoe_vllm
from puzzlemoe_vllm import method
from puzzlemoe_vllm.backends import ExpertWeights, reference
from puzzlemoe_vllm.config import PuzzleMoEConfig
from puzzlemoe_vllm.format.codes import get_code
from puzzlemoe_vllm.format.layout import LayoutError

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, GROUP = 6, 64, 64, 3, 32

PREFIX = "model.layers.0.mlp.experts"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Ranks:
    """Ranks that share a layer: by splitting every expert (tensor parallel), or by splitting the list of experts.

    placement: vLLM's name of how the list is split.
    """

    count: int
    expert_parallel: bool = False
    placement: str = "linear"

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
    group: int = GROUP
    sizes: tuple[int, int] = (HIDDEN, INTERMEDIATE)

    def of_size(self, intermediate: int) -> Layer:
        """The same tensors in a model of another intermediate size."""
        return replace(self, sizes=(self.sizes[0], intermediate))

    @property
    def group_size(self) -> int | None:
        return self.group if get_code(self.code).has_steps else None

    def weight(self, expert: int, projection: str) -> Tensor:
        """An expert's reconstructed weight in float64."""
        if self.centres:
            expert = self.centres[expert]
        if expert >= self.merged:
            return self.tensors[f"{expert}.{projection}.weight"].double()
        pair = f"{expert & ~1}.{projection}"
        words, steps = self.tensors[f"{pair}.puzzle"], self.tensors.get(f"{pair}.puzzle_grid")
        return get_code(self.code).decode(words, expert & 1, steps).double()


def random_layer(
    merged: int, code: str = "mask16", group: int = GROUP, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE
) -> Layer:
    pair_code, draw = get_code(code), generator(0)
    tensors = {}
    for name in PROJECTIONS:
        shape = (hidden, intermediate) if name == "down_proj" else (intermediate, hidden)
        for leader in range(0, merged, 2):
            tensors[f"{leader}.{name}.puzzle"] = random_words(pair_code, *shape, draw)
            if pair_code.has_steps:
                tensors[f"{leader}.{name}.puzzle_grid"] = random_steps(*shape, group, draw)
        for expert in range(merged, EXPERTS):
            tensors[f"{expert}.{name}.weight"] = random_dense(*shape, draw)
    return Layer(merged, tensors, code, group=group, sizes=(hidden, intermediate))


def clustered_layer(centres: tuple[int, ...]) -> Layer:
    dense = random_layer(merged=0).tensors
    kept = {name: tensor for name, tensor in dense.items() if int(name.split(".")[0]) in centres}
    return Layer(0, kept, centres=centres)


@pytest.fixture(scope="module")
def layer() -> Layer:
    """Of two expert-parallel ranks with three experts each, both hold the pair of experts 2 and 3."""
    return random_layer(merged=4)


def routed_experts(parallel: FusedMoEParallelConfig, layer: Layer, placement: str = "linear") -> RoutedExperts:
    """One rank's layer, without weights, as vLLM's FusedMoE factory builds it."""
    manager = ExpertMapManager(
        max_num_batched_tokens=64,
        top_k=TOP_K,
        global_num_experts=EXPERTS,
        num_redundant_experts=0,
        num_expert_group=2,  # round robin is for routers with groups alone
        moe_parallel_config=parallel,
        placement_strategy=placement,
        enable_eplb=parallel.enable_eplb,
    )
    config = FusedMoEConfig(
        num_experts=EXPERTS,
        experts_per_token=TOP_K,
        hidden_dim=layer.sizes[0],
        intermediate_size=layer.sizes[1],
        num_local_experts=manager.local_num_experts,
        num_logical_experts=EXPERTS,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
    )
    pairs = {"code": layer.code, "group_size": layer.group_size, "merged_experts": {"0": layer.merged}}
    quantization = PuzzleMoEConfig.from_config({"clusters": {"0": list(layer.centres)}} if layer.centres else pairs)
    return RoutedExperts(PREFIX, torch.bfloat16, config, quantization, manager)


def loaded(parallel: FusedMoEParallelConfig, layer: Layer, placement: str = "linear") -> RoutedExperts:
    module = routed_experts(parallel, layer, placement)
    record_metadata_for_reloading(module)
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


# Six experts on four ranks are two, two, one and one; on five, the rank of two has a pair and the others halves; on
# seven, one rank has no expert at all.  Round robin leaves no pair whole.
UNEVEN = [Ranks(count, True, placement) for count in (4, 5, 7) for placement in ("linear", "round_robin")]


@pytest.mark.parametrize("layer", [random_layer(4), random_layer(6, "angle8"), clustered_layer((0, 4, 0, 0, 4, 5))])
@pytest.mark.parametrize("ranks", [*UNEVEN, Ranks(2, True, "round_robin")], ids=str)
def test_sum_over_ranks_with_uneven_shares_of_the_experts(ranks, layer):
    check_sum_over_ranks(ranks, layer)


def test_pairs_that_most_ranks_hold_in_half_are_warned_of(monkeypatch):
    """A pair takes its whole memory on each rank that has one of its experts."""
    warnings: list[str] = []
    monkeypatch.setattr(method.logger, "warning_once", lambda text, *values: warnings.append(text % values))
    layer = random_layer(6)
    for count in (2, 4, 5):
        for rank in range(count):
            routed_experts(Ranks(count, True).parallel_config(rank), layer)
    assert warnings == []
    routed_experts(Ranks(2, True).parallel_config(1), layer, "round_robin")
    assert len(warnings) == 1 and "3 of this rank's 3 pairs" in warnings[0] and "linear" in warnings[0]


@pytest.mark.parametrize("code", ["angle16", "angle8", "angle6", "mask6", "trellis8", "trellis3"])
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
    config = PuzzleMoEConfig.from_config({"clusters": {"1": [0, 0, 2]}})
    for experts, layers in ((4, 2), (3, 1)):
        model = SimpleNamespace(num_experts=experts, num_hidden_layers=layers)
        with pytest.raises(LayoutError, match=f"clusters of 3 experts in layer 1, .* {layers} layers of {experts}"):
            config.maybe_update_config("model", model)
    config.maybe_update_config("model", SimpleNamespace(num_experts=3, num_hidden_layers=2))


@pytest.mark.parametrize(
    ("prefix", "packed"),
    [
        ("model.layers.0.mlp.experts", True),
        ("layers.0.mlp.experts", True),
        ("language_model.model.layers.0.mlp.experts", True),
        ("model.language_model.layers.0.feed_forward.experts", True),
        ("model.layers.1.mlp.experts", False),
        ("mtp.layers.0.mlp.experts", False),
        ("model.mtp.layers.0.mlp.experts", False),
        ("model.mtp_block.layers.0.mlp.experts", False),
        ("language_model.mtp.layers.0.mlp.experts", False),
        ("visual.layers.0.mlp.experts", False),
    ],
)
def test_only_layers_of_the_decoder_are_packed(prefix, packed):
    """Layers for multi-token prediction and of towers have numbers of their own, and are dense."""
    module = routed_experts(Ranks(1).parallel_config(0), random_layer(4))
    config = PuzzleMoEConfig.from_config({"code": "mask16", "merged_experts": {"0": 4}})
    assert (config.get_quant_method(module, prefix) is not None) == packed


def check_sum_over_ranks(ranks: Ranks, layer: Layer) -> None:
    x, routing, ids = batch()
    modules = [loaded(ranks.parallel_config(rank), layer, ranks.placement) for rank in range(ranks.count)]
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


# Ranks of 32 columns have groups of 32; ranks of 16 are widened by zeros, on one side or the other.
@pytest.mark.parametrize("code", ["angle8", "angle6", "trellis5"])
@pytest.mark.parametrize("ranks", [Ranks(2), Ranks(4), Ranks(4, expert_parallel=True)], ids=str)
def test_sum_over_ranks_that_cut_a_group(ranks, code):
    check_sum_over_ranks(ranks, random_layer(4, code, group=64))


# Intermediate sizes of Qwen1.5-MoE and DeepSeek-MoE-16B, and of Qwen3-30B-A3B, with the groups that each rank gets.
@pytest.mark.parametrize(
    ("intermediate", "count", "group"),
    [(1408, 1, 128), (1408, 2, 64), (1408, 4, 32), (1408, 8, 32), (768, 2, 128), (768, 4, 64), (768, 8, 32)],
)
@pytest.mark.parametrize("code", ["angle8", "angle6", "trellis5"])
def test_a_rank_that_cuts_groups_has_the_same_weights(code, intermediate, count, group):
    layer = random_layer(4, code, group=128, hidden=2048, intermediate=intermediate)
    whole = [[layer.weight(expert, name).bfloat16() for name in PROJECTIONS] for expert in range(EXPERTS)]
    columns = intermediate // count
    for rank in range(count):
        module = loaded(Ranks(count).parallel_config(rank), layer)
        weights = module.quant_method._weights(module)
        padded = weights.w2_dense.shape[2]
        assert weights.w13_steps.shape[2] * group == 2048 and weights.w2_steps.shape[2] * group == padded
        front = columns * rank % group if columns % group else 0
        here, part = slice(front, front + columns), slice(columns * rank, columns * (rank + 1))
        for expert, (gate, up, down) in enumerate(whole):
            w13, w2 = reference.expert_weights(weights, expert)
            for half, expected in zip(w13.chunk(2), (gate, up), strict=True):
                assert torch.equal(half[here], expected[part])
                assert not half[:front].any() and not half[front + columns :].any()
            assert torch.equal(w2[:, here], down[:, part])


def test_group_size_of_another_model_is_refused():
    with pytest.raises(LayoutError, match=r"intermediate size 64 must be multiples of the group size 128"):
        routed_experts(Ranks(2).parallel_config(0), random_layer(4, "angle8", group=128, intermediate=256).of_size(64))


def test_routers_are_asked_for_the_ids_that_kernels_read(layer):
    """By a property of the method, which vLLM's own has as well: some routers give int64 to those who do not ask."""
    module = routed_experts(Ranks(1).parallel_config(0), layer)
    assert isinstance(getattr(FusedMoEMethodBase, "topk_indices_dtype", None), property)
    assert module.quant_method.topk_indices_dtype == torch.int32


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


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 3e38])
@pytest.mark.parametrize("name", ["2.up_proj.puzzle_grid", "2.down_proj.puzzle_grid"])
def test_steps_that_are_not_finite_are_refused(name, value):
    layer = random_layer(4, "angle8")
    layer.tensors[name][-1, -1] = value
    with pytest.raises(
        LayoutError, match=r"experts.2: its steps \(w(13|2)_puzzle_grid\) are NaN, infinite or too large"
    ):
        loaded(Ranks(1).parallel_config(0), layer)


@pytest.mark.parametrize("name", ["5.gate_proj.weight", "5.down_proj.weight"])
def test_dense_experts_that_are_not_finite_are_refused(name):
    layer = random_layer(4)
    layer.tensors[name][0, 0] = float("inf")
    with pytest.raises(LayoutError, match=r"experts.5: its weights \(w(13|2)_weight\) are NaN, infinite or too large"):
        loaded(Ranks(1).parallel_config(0), layer)


def reverse(weights: ExpertWeights) -> None:
    """As the CUDA library's `prepare`, it leaves the weights in an order of its own."""
    for tensor in (weights.w13_pairs, weights.w2_pairs, weights.w13_dense, weights.w2_dense):
        tensor.detach().copy_(tensor.flip(-1))


REVERSING = SimpleNamespace(__name__="backends.reversing", READS_CHECKPOINT_ORDER=False, prepare=reverse)


@pytest.fixture(params=[False, True], ids=["checkpoint order", "kernel order"])
def any_order(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(method, "backend_for", lambda device: REVERSING)


def held(module: RoutedExperts) -> dict[str, Tensor]:
    """What the layer's kernels read."""
    maps = {name: getattr(module, name) for name in ("puzzle_map", "puzzle_centres")}
    return dict(module.named_parameters()) | {name: tensor for name, tensor in maps.items() if tensor is not None}


LAYERS = {
    "pairs": lambda: random_layer(4),
    "pairs only": lambda: random_layer(6),
    "steps": lambda: random_layer(4, "angle8"),
    "cut steps": lambda: random_layer(2, "angle6", group=64),
    "tiles": lambda: random_layer(4, "trellis4"),
    "cut tiles": lambda: random_layer(2, "trellis6", group=64),
    "clusters": lambda: clustered_layer((0, 4, 0, 0, 4, 4)),
}


@pytest.mark.parametrize("ranks", [Ranks(1), Ranks(4), Ranks(2, expert_parallel=True)], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_reload_after_memory_was_discarded(any_order, kind, ranks):
    layer = LAYERS[kind]()
    for rank in range(ranks.count):
        module = loaded(ranks.parallel_config(rank), layer)
        before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in held(module).items()}
        for _ in range(2):
            for tensor in held(module).values():
                tensor.detach().fill_(77)
            initialize_layerwise_reload(module)
            list(module.load_weights(list(layer.tensors.items())))
            finalize_layerwise_reload(module, SimpleNamespace(dtype=torch.bfloat16))
            assert held(module).keys() == before.keys()
            for name, tensor in held(module).items():
                assert torch.equal(tensor, before[name][0]) and tensor.data_ptr() == before[name][1], name


def test_an_update_with_other_weights(any_order):
    first, second = random_layer(4, "angle8"), random_layer(4, "angle8")
    for tensor in second.tensors.values():
        tensor.copy_(tensor.flip(0))
    module = loaded(Ranks(1).parallel_config(0), first)
    initialize_layerwise_reload(module)
    list(module.load_weights(list(second.tensors.items())))
    finalize_layerwise_reload(module, SimpleNamespace(dtype=torch.bfloat16))
    expected = held(loaded(Ranks(1).parallel_config(0), second))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in held(module).items())


def test_a_reload_must_be_complete(any_order, layer):
    module = loaded(Ranks(1).parallel_config(0), layer)
    initialize_layerwise_reload(module)
    list(module.load_weights(list(layer.tensors.items())[:-1]))
    with pytest.raises(LayoutError, match="1 expert tensors are missing"):
        finalize_layerwise_reload(module, SimpleNamespace(dtype=torch.bfloat16))


def test_weights_in_checkpoint_order_may_be_loaded_over(layer):
    module = loaded(Ranks(1).parallel_config(0), layer)
    list(module.load_weights(list(layer.tensors.items())[:-1]))
    with pytest.raises(LayoutError, match="1 expert tensors are missing"):
        module.quant_method.process_weights_after_loading(module)


def test_weights_in_kernel_order_may_not(monkeypatch, layer):
    monkeypatch.setattr(method, "backend_for", lambda device: REVERSING)
    module = loaded(Ranks(1).parallel_config(0), layer)
    before = {name: tensor.clone() for name, tensor in held(module).items()}
    with pytest.raises(RuntimeError, match="kernels' own order: update them by reload_weights"):
        list(module.load_weights(list(layer.tensors.items())))
    module.quant_method.process_weights_after_loading(module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in held(module).items())


def test_expert_load_balancing_is_refused(layer):
    with pytest.raises(NotImplementedError, match="EPLB"):
        routed_experts(Ranks(2, expert_parallel=True).parallel_config(0, enable_eplb=True), layer)


def test_all2all_backend_that_needs_modular_kernels_is_refused(layer):
    ranks = Ranks(2, expert_parallel=True)
    fields = {"dp_size": 2, "all2all_backend": "deepep_low_latency"}
    with pytest.raises(ValueError, match=r"deepep_low_latency.*allgather_reducescatter"):
        routed_experts(ranks.parallel_config(0, **fields), layer)
    routed_experts(ranks.parallel_config(0, dp_size=2), layer)


@pytest.fixture
def linear_method(monkeypatch):
    """What a linear layer of a name gets, in a model that has some in FP8."""
    served = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
    monkeypatch.setattr(vllm_fp8, "get_current_vllm_config", lambda: served, raising=False)
    names = [f"model.layers.0.{n}_proj" for n in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.shared_experts.up")]
    config = {"quant_method": "puzzlemoe", "code": "mask16", "merged_experts": {"0": 2}, "fp8": names}
    quantization = get_quantization_config("puzzlemoe").from_config(config)
    linear = LinearBase.__new__(LinearBase)
    torch.nn.Module.__init__(linear)
    return quantization, lambda name: quantization.get_quant_method(linear, f"model.layers.0.{name}")


def test_linear_layers_in_fp8_get_vllm_s_method(linear_method):
    _, method_of = linear_method
    for name in ("self_attn.qkv_proj", "self_attn.k_proj"):
        found = method_of(name)
        assert type(found) is vllm_fp8.Fp8LinearMethod and found.block_quant
        assert found.quant_config.is_checkpoint_fp8_serialized and found.quant_config.weight_block_size == [128, 128]
    for name in ("self_attn.o_proj", "mlp.gate", "mlp.gate_up_proj"):
        assert type(method_of(name)) is UnquantizedLinearMethod


def test_a_layer_half_in_fp8_is_refused(linear_method):
    with pytest.raises(LayoutError, match="has only some of gate_proj, up_proj in fp8"):
        linear_method[1]("mlp.shared_experts.gate_up_proj")


def test_layers_that_a_model_fuses_or_renames(linear_method):
    quantization, method_of = linear_method
    quantization.packed_modules_mapping = {"qk_proj": ["q_proj", "k_proj"]}
    assert type(method_of("self_attn.qk_proj")) is vllm_fp8.Fp8LinearMethod
    quantization.apply_vllm_mapper(
        SimpleNamespace(apply_list=lambda names: [n.replace("layers.0", "layers.7") for n in names])
    )
    assert type(method_of("self_attn.qk_proj")) is UnquantizedLinearMethod
