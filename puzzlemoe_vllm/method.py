"""Routed experts of one layer in vLLM: create the parameters, load them, check that all came, prepare them, apply."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase

from puzzlemoe_vllm.backends import ExpertWeights
from puzzlemoe_vllm.clusters import choose_clusters
from puzzlemoe_vllm.format.codes import GROUP_SIZES, get_code
from puzzlemoe_vllm.format.layout import LayoutError, PuzzleConfig
from puzzlemoe_vllm.ops import backend_for, fused_experts

logger = init_logger(__name__)

STORED_AFTER_LOADING = ("sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache")
"""Load formats that bring parameters back as they were in memory, where words may be in a kernel's own order."""

SHARDS = ("w1", "w2", "w3")
"""vLLM's names of the gate, down and up projection."""


class PuzzleMoEMethod(FusedMoEMethodBase):
    """Serves experts 0..merged-1 of a layer from pair words and the others from dense bf16 weights.

    centres: for each expert the one that serves in its place; None without clusters.
    """

    def __init__(self, moe: FusedMoEConfig, layout: PuzzleConfig, merged: int, centres: list[int] | None, prefix: str):
        super().__init__(moe)
        self.code, self.group_size = get_code(layout.code or "mask16"), layout.group_size
        self.merged, self.centres, self.prefix = merged, centres, prefix
        parallel = moe.moe_parallel_config
        if parallel.use_all2all_kernels and parallel.all2all_backend != "allgather_reducescatter":
            raise ValueError(
                f"puzzlemoe does not work with all2all backend {parallel.all2all_backend!r}: "
                "use --all2all-backend allgather_reducescatter"
            )

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Sizes stay as they are: the kernels take any multiple of 16."""
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: vLLM's modular kernels are not used."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Parameters of this rank's pairs and dense experts.

        Raises ValueError for an activation, bias, per-rank size, backend, load format or LoRA that does not serve.
        """
        self._check_supported(layer, hidden_size, intermediate_size_per_partition)
        backend_for(torch.empty(0).device.type)  # a choice that cannot serve fails before anything is loaded
        local = self._local_experts(layer, extra["global_num_experts"])
        pairs = sorted({expert >> 1 for expert in local if expert < self.merged})
        dense = [expert for expert in local if expert >= self.merged]
        pair_rows = {2 * pair: row for row, pair in enumerate(pairs)}
        dense_rows = {expert: row for row, expert in enumerate(dense)}
        self._expected: set[tuple[str, int, str]] = set()
        for name, rows, shards in (
            ("w13", 2 * intermediate_size_per_partition, ("w1", "w3")),
            ("w2", hidden_size, ("w2",)),
        ):
            columns = hidden_size if name == "w13" else intermediate_size_per_partition
            words = (len(pairs), *self.code.words_shape(rows, columns))
            self._add(layer, f"{name}_puzzle", words, self.code.dtype, pair_rows, shards)
            self._add(layer, f"{name}_weight", (len(dense), rows, columns), torch.bfloat16, dense_rows, shards)
            if self.group_size:
                steps = (len(pairs), rows, columns // self.group_size)
                self._add(layer, f"{name}_puzzle_grid", steps, torch.bfloat16, pair_rows, shards)
        self._missing = set(self._expected)
        layer.register_buffer("puzzle_map", self._expert_map(layer, local, pair_rows, dense_rows), persistent=False)
        centres = None if self.centres is None else torch.tensor(self.centres, dtype=torch.int32)
        layer.register_buffer("puzzle_centres", centres, persistent=False)
        config = get_current_vllm_config()
        self._check_lora(config.lora_config)
        load_format = config.load_config.load_format
        if load_format in STORED_AFTER_LOADING:
            raise ValueError(f"puzzlemoe cannot load {load_format!r} weights: serve the packed folder itself")
        self._check_loaded = load_format != "dummy"

    def _check_supported(self, layer: Any, hidden: int, intermediate: int) -> None:
        activation = getattr(layer.activation, "value", layer.activation)
        if activation != "silu" or self.moe.has_bias or getattr(layer, "swiglu_limit", None) is not None:
            raise ValueError(
                f"{self.prefix}: puzzlemoe serves plain SiLU-gated experts without bias, not {activation!r}"
            )
        if layer.apply_router_weight_on_input:
            raise ValueError(f"{self.prefix}: puzzlemoe does not apply router weights on the experts' input")
        if hidden % 16 or intermediate % 16:
            raise ValueError(
                f"{self.prefix}: hidden size {hidden} and per-rank intermediate size {intermediate} must be "
                "multiples of 16: lower --tensor-parallel-size or use --enable-expert-parallel"
            )
        if self.group_size and (hidden % self.group_size or intermediate % self.group_size):
            smaller = [size for size in GROUP_SIZES if hidden % size == 0 and intermediate % size == 0]
            advice = f"compress again with --group-size {smaller[0]}, or " if smaller else ""
            raise ValueError(
                f"{self.prefix}: hidden size {hidden} and per-rank intermediate size {intermediate} must be multiples "
                f"of the group size {self.group_size}, whose columns share a step: {advice}"
                "lower --tensor-parallel-size or use --enable-expert-parallel"
            )

    def _check_lora(self, lora: Any) -> None:
        """vLLM itself would say something about modular kernels."""
        targets = getattr(lora, "target_modules", None)
        if lora is not None and (targets is None or "experts" in targets):
            raise ValueError(
                f"{self.prefix}: puzzlemoe does not serve LoRA adapters of experts: name the modules that yours adapt, "
                "as in --lora-target-modules q_proj k_proj v_proj o_proj, or drop --enable-lora"
            )

    def _local_experts(self, layer: Any, total: int) -> list[int]:
        """Global ids of this rank's experts that have weights."""
        placement = layer._expert_map
        local = range(total) if placement is None else (placement.cpu() >= 0).nonzero().flatten().tolist()
        return [expert for expert in local if self.centres is None or self.centres[expert] == expert]

    def _expert_map(
        self, layer: Any, local: list[int], pair_rows: dict[int, int], dense_rows: dict[int, int]
    ) -> Tensor | None:
        """int32 global expert id -> local id as `ExpertWeights` counts them; None when both are the same."""
        placement = layer._expert_map
        if placement is None and self.centres is None:
            return None
        total = len(placement if self.centres is None else self.centres)
        rows = torch.full((total,), -1, dtype=torch.int32)
        for expert in local:
            if expert in dense_rows:
                rows[expert] = 2 * len(pair_rows) + dense_rows[expert]
            else:
                rows[expert] = 2 * pair_rows[expert & ~1] + (expert & 1)
        return rows if placement is None else rows.to(placement.device)

    def _add(
        self,
        layer: Any,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        rows: dict[int, int],
        shards: tuple[str, ...],
    ) -> None:
        parameter = Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        # vLLM's model code calls this attribute for every tensor below `experts.{id}.{projection}.`.
        parameter.weight_loader = partial(self._load, name, rows)  # type: ignore[attr-defined]
        layer.register_parameter(name, parameter)
        self._expected |= {(name, expert, shard) for expert in rows for shard in shards}

    def _load(
        self,
        name: str,
        rows: dict[int, int],
        param: Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Copies this rank's slice of one projection; False for an expert that lives on another rank.

        Raises LayoutError for a wrong dtype or shape, naming the tensor.
        """
        row = rows.get(expert_id)
        if row is None:
            if "_puzzle" in name and (expert_id >= self.merged or expert_id % 2):
                raise LayoutError(
                    f"{weight_name} of expert {expert_id} ({self.prefix}): config.json names no such pair"
                )
            return False if return_success else None
        if loaded_weight.dtype != param.dtype:
            raise LayoutError(
                f"{weight_name} of expert {expert_id} ({self.prefix}): dtype {loaded_weight.dtype}, expected "
                f"{param.dtype}; compress the source model again"
            )
        target = self._target(param.data[row], shard_id)
        size, rank = self.moe.tp_size, self.moe.tp_rank
        dim = 1 if shard_id == "w2" else 0
        part = loaded_weight.shape[dim] // size
        shard = loaded_weight.narrow(dim, part * rank, part)
        if shard.shape != target.shape or part * size != loaded_weight.shape[dim]:
            raise LayoutError(
                f"{weight_name} of expert {expert_id} ({self.prefix}): shape {tuple(loaded_weight.shape)} does not fit "
                f"{tuple(target.shape)} on each of {size} ranks: config.json belongs to another model"
            )
        target.copy_(shard)
        self._missing.discard((name, expert_id, shard_id))
        return True if return_success else None

    @staticmethod
    def _target(row: Tensor, shard_id: str) -> Tensor:
        if shard_id == "w2":
            return row
        gate, up = row.chunk(2, dim=0)
        return gate if shard_id == "w1" else up

    def process_weights_after_loading(self, layer: Any) -> None:
        """Checks that every tensor came, then puts the weights into the backend's order.

        Raises LayoutError naming the first missing tensor.
        """
        if self._check_loaded and self._missing:
            name, expert, shard = min(self._missing)
            raise LayoutError(
                f"{self.prefix}: {len(self._missing)} expert tensors are missing from the checkpoint, first "
                f"{name} {shard} of expert {expert}: the copy is incomplete, or config.json belongs to another model"
            )
        # A later weight reload fills the parameters anew and must be complete again.
        self._missing = set(self._expected)
        backend = backend_for(layer.w13_puzzle.device.type)
        backend.prepare(self._weights(layer))
        logger.info_once("puzzlemoe: %s pair words, %s kernels", self.code.name, backend.__name__.rsplit(".", 1)[1])

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """This rank's share of the routed experts' output, [M, H] in x.dtype; vLLM adds shared experts and ranks."""
        del shared_experts, shared_experts_input
        if layer.puzzle_centres is not None:
            topk_weights, topk_ids = choose_clusters(topk_weights, topk_ids, layer.puzzle_centres)
        return fused_experts(x, topk_weights, topk_ids, self._weights(layer))

    def _weights(self, layer: Any) -> ExpertWeights:
        return ExpertWeights(
            layer.w13_puzzle,
            layer.w2_puzzle,
            layer.w13_weight,
            layer.w2_weight,
            layer.puzzle_map,
            self.code.name,
            layer.w13_puzzle_grid if self.group_size else None,
            layer.w2_puzzle_grid if self.group_size else None,
        )
