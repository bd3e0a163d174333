"""Routed experts of one layer in vLLM: create the parameters, load them, check that all came, prepare them, apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase

from puzzlemoe_vllm.backends import ExpertWeights
from puzzlemoe_vllm.clusters import choose_clusters
from puzzlemoe_vllm.format.codes import CODES, Decoder, get_code
from puzzlemoe_vllm.format.layout import LayoutError
from puzzlemoe_vllm.ops import backend_for, check_backend, fused_experts
from puzzlemoe_vllm.rank_share import rank_share
from puzzlemoe_vllm.served_files import ServedFiles

logger = init_logger(__name__)

STORED_AFTER_LOADING = ("sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache")
"""Load formats that bring parameters back as they were in memory, where words may be in a kernel's own order."""

CODE_OF_NO_WORDS = next(code for code in CODES.values() if code.decoder is Decoder.MASK16)
"""What the empty parameters of a model of clusters are in; its CUDA kernels read dense experts in the same launch."""

IN_KERNEL_ORDER = "puzzlemoe_in_kernel_order"
"""Attribute of a parameter that a backend has put into its own order."""


class PuzzleMoEMethod(FusedMoEMethodBase):
    """Serves experts 0..merged-1 of a layer from pair words and the others from dense bf16 weights.

    files: the folder that the model comes from.
    centres: for each expert the one that serves in its place; None without clusters.
    """

    def __init__(self, moe: FusedMoEConfig, files: ServedFiles, merged: int, centres: list[int] | None, prefix: str):
        super().__init__(moe)
        self.files = files
        self.code = get_code(files.layout.code) if files.layout.code else CODE_OF_NO_WORDS
        self.group_size = files.layout.group_size
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

    @property
    def topk_indices_dtype(self) -> torch.dtype:
        """What the kernels read: routers that would give int64 need not be followed by a conversion."""
        return torch.int32

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
        config = get_current_vllm_config()
        # A choice that cannot serve fails before anything is loaded.
        eager = config.model_config is None or config.model_config.enforce_eager
        check_backend(torch.empty(0).device.type, eager, self.code)
        local = self._local_experts(layer, extra["global_num_experts"])
        pairs = sorted({expert >> 1 for expert in local if expert < self.merged})
        _warn_of_halves(local, pairs)
        dense = [expert for expert in local if expert >= self.merged]
        pair_rows = {2 * pair: row for row, pair in enumerate(pairs)}
        dense_rows = {expert: row for row, expert in enumerate(dense)}
        self.share = rank_share(intermediate_size_per_partition, self.moe.tp_rank, self.group_size)
        self._expected: set[tuple[str, int, str]] = set()
        self._rows: dict[str, dict[int, int]] = {}
        for name, rows, columns, shards in (
            ("w13", 2 * self.share.padded, hidden_size, ("w1", "w3")),
            ("w2", hidden_size, self.share.padded, ("w2",)),
        ):
            words = (len(pairs), *self.code.words_shape(rows, columns))
            self._add(layer, f"{name}_puzzle", words, self.code.dtype, pair_rows, shards)
            self._add(layer, f"{name}_weight", (len(dense), rows, columns), torch.bfloat16, dense_rows, shards)
            if self.share.group_size:
                steps = (len(pairs), rows, columns // self.share.group_size)
                self._add(layer, f"{name}_puzzle_grid", steps, torch.bfloat16, pair_rows, shards)
        self._missing = set(self._expected)
        # No buffers: a reload would count them among what it loads.  Sleep level 2 empties GPU memory, so what they
        # hold stays on the host as well.
        self._maps = {
            "puzzle_map": self._expert_map(layer, local, pair_rows, dense_rows),
            "puzzle_centres": None
            if self.centres is None
            else torch.tensor(self.centres, dtype=torch.int32, device="cpu"),
        }
        for name, values in self._maps.items():
            setattr(layer, name, None if values is None else values.to(torch.empty(0).device, copy=True))
        self._check_lora(config.lora_config)
        load_format = config.load_config.load_format
        if load_format in STORED_AFTER_LOADING:
            raise ValueError(f"puzzlemoe cannot load {load_format!r} weights: serve the packed folder itself")
        self._check_loaded = load_format != "dummy"
        self._model_config, self._download_dir = self.files.source(config), config.load_config.download_dir

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
        if self.group_size and (hidden % self.group_size or intermediate * self.moe.tp_size % self.group_size):
            raise LayoutError(
                f"{self.prefix}: hidden size {hidden} and intermediate size {intermediate * self.moe.tp_size} must be "
                f"multiples of the group size {self.group_size}: config.json belongs to another model"
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
        """int32 global expert id -> local id as `ExpertWeights` counts them, on the host; None when both are the
        same."""
        placement = layer._expert_map
        if placement is None and self.centres is None:
            return None
        total = len(placement if self.centres is None else self.centres)
        rows = torch.full((total,), -1, dtype=torch.int32, device="cpu")
        for expert in local:
            if expert in dense_rows:
                rows[expert] = 2 * len(pair_rows) + dense_rows[expert]
            else:
                rows[expert] = 2 * pair_rows[expert & ~1] + (expert & 1)
        return rows

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
        parameter.weight_loader = self._loader(name, rows)  # type: ignore[attr-defined]
        if rows:  # what a reload waits for; the zeros beside a rank's share never come
            targets = (self._target(name, parameter.data[0], shard) for shard in shards)
            parameter.weight_loader_numel = len(rows) * sum(target.numel() for target in targets)  # type: ignore[attr-defined]
        layer.register_parameter(name, parameter)
        self._rows[name] = rows
        self._expected |= {(name, expert, shard) for expert in rows for shard in shards}

    def _loader(self, name: str, rows: dict[int, int]) -> Callable[..., bool | None]:
        """A reload of vLLM asks for the loader's __name__, and finds the parameter among its arguments by name."""

        def load_expert(
            param: Parameter,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            loaded = self._load(name, rows, param, loaded_weight, weight_name, shard_id, expert_id)
            return loaded if return_success else None

        return load_expert

    def _load(
        self,
        name: str,
        rows: dict[int, int],
        param: Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
    ) -> bool:
        """Copies this rank's slice of one projection; False for an expert that lives on another rank.

        Raises LayoutError for a wrong dtype or shape, naming the tensor, and when the folder that it comes from is not
        as it was written.
        """
        self._check_files()
        row = rows.get(expert_id)
        if row is None:
            if "_puzzle" in name and (expert_id >= self.merged or expert_id % 2):
                raise LayoutError(
                    f"{weight_name} of expert {expert_id} ({self.prefix}): config.json names no such pair"
                )
            return False
        if getattr(param, IN_KERNEL_ORDER, False):
            raise RuntimeError(
                f"{self.prefix}: the weights are in the kernels' own order: update them by reload_weights, or between "
                "start_weight_update and finish_weight_update, not by the model's load_weights alone"
            )
        if loaded_weight.dtype != param.dtype:
            raise LayoutError(
                f"{weight_name} of expert {expert_id} ({self.prefix}): dtype {loaded_weight.dtype}, expected "
                f"{param.dtype}; compress the source model again"
            )
        target = self._target(name, param.data[row], shard_id)
        size = self.moe.tp_size
        dim = 1 if shard_id == "w2" else 0
        part = loaded_weight.shape[dim] // size
        if name == "w2_puzzle_grid":
            shard, whole = self.share.cut(loaded_weight), loaded_weight.shape[1] * (self.group_size or 0)
            fits = whole == self.share.columns * size
        elif name == "w2_puzzle":
            first, _, columns = self.share.tiles(self.code.tile[1])
            begin, end = self._stored(name, first, first + columns)
            shard = loaded_weight[:, begin:end]
            fits = loaded_weight.shape[1] == self._stored(name, self.share.columns * size)[0]
        else:
            shard = loaded_weight.narrow(dim, part * self.moe.tp_rank, part)
            shard = self.share.repeat(shard) if name == "w13_puzzle_grid" else shard
            fits = part * size == loaded_weight.shape[dim]
        if shard.shape != target.shape or not fits:
            raise LayoutError(
                f"{weight_name} of expert {expert_id} ({self.prefix}): shape {tuple(loaded_weight.shape)} does not fit "
                f"{tuple(target.shape)} on each of {size} ranks: config.json belongs to another model"
            )
        target.copy_(shard)
        self._missing.discard((name, expert_id, shard_id))
        return True

    def _check_files(self) -> None:
        if self._check_loaded and self._model_config is not None:
            self.files.check_while_loading(self._model_config, self._download_dir)

    def _target(self, name: str, row: Tensor, shard_id: str) -> Tensor:
        """Where a projection of one row's expert goes."""
        share = self.share
        if shard_id != "w2":
            return row.chunk(2, dim=0)[shard_id == "w3"].narrow(0, *self._stored(name, share.front, share.columns))
        if name == "w2_puzzle_grid":
            return row
        return row.narrow(1, *self._stored(name, *self._of_w2(name)))

    def _of_w2(self, name: str) -> tuple[int, int]:
        """Where in the rank's down projection what it loads begins, and its columns."""
        share = self.share
        return share.tiles(self.code.tile[1])[1:] if name == "w2_puzzle" else (share.front, share.columns)

    def _stored(self, name: str, *counts: int) -> tuple[int, ...]:
        """Numbers of the intermediate size's columns (of w2) or rows (of w13) as numbers of stored ones."""
        if not name.endswith("_puzzle"):
            return counts
        tile = self.code.tile
        if name == "w2_puzzle":
            return tuple(self.code.words_shape(tile[0], columns)[1] for columns in counts)
        return tuple(self.code.words_shape(rows, tile[1])[0] for rows in counts)

    def _clear_padding(self, layer: Any) -> None:
        """Zeros beside this rank's columns: steps of zero make whatever their words are a weight of zero."""
        share = self.share
        if not share.front and not share.back:
            return
        for name, parameter in layer.named_parameters(recurse=False):
            if name.startswith("w13"):
                front, columns = self._stored(name, share.front, share.columns)
                for half in parameter.data.chunk(2, dim=1):
                    half[:, :front] = 0
                    half[:, front + columns :] = 0
            elif name in ("w2_puzzle", "w2_weight"):
                front, columns = self._stored(name, *self._of_w2(name))
                parameter.data[:, :, :front] = 0
                parameter.data[:, :, front + columns :] = 0

    def process_weights_after_loading(self, layer: Any) -> None:
        """Checks that every tensor came, then puts the weights into the backend's order.

        Raises LayoutError naming the first tensor that is missing or not finite.
        """
        if getattr(layer.w13_puzzle, IN_KERNEL_ORDER, False):
            return  # nothing was loaded since
        self._check_files()
        if self._check_loaded and self._missing:
            name, expert, shard = min(self._missing)
            raise LayoutError(
                f"{self.prefix}: {len(self._missing)} expert tensors are missing from the checkpoint, first "
                f"{name} {shard} of expert {expert}: the copy is incomplete, or config.json belongs to another model"
            )
        self._clear_padding(layer)
        if self._check_loaded:
            self._check_finite(layer)
        for name, values in self._maps.items():
            if values is not None:
                getattr(layer, name).copy_(values)
        # A later weight reload fills the parameters anew and must be complete again.
        self._missing = set(self._expected)
        backend = backend_for(layer.w13_puzzle.device.type)
        backend.prepare(self._weights(layer))
        for parameter in layer.parameters(recurse=False):
            setattr(parameter, IN_KERNEL_ORDER, not backend.READS_CHECKPOINT_ORDER)
        logger.info_once("puzzlemoe: %s pair words, %s kernels", self.code.name, backend.__name__.rsplit(".", 1)[1])

    def _check_finite(self, layer: Any) -> None:
        """Raises LayoutError naming an expert whose dense weights, or whose weights by their steps, are not finite."""
        largest = torch.finfo(torch.bfloat16).max
        step_limit = largest / self.code.largest_value
        for name, rows in self._rows.items():
            if name.endswith("_puzzle"):
                continue
            kind, limit = ("steps", step_limit) if name.endswith("_grid") else ("weights", largest)
            low, high = getattr(layer, name).data.flatten(1).aminmax(dim=1)
            # A comparison with NaN is false.  One answer of the device for all experts: each waits for its work.
            within = ((low >= -limit) & (high <= limit)).tolist()
            for expert, row in rows.items():
                if not within[row]:
                    raise LayoutError(
                        f"{self.prefix}.{expert}: its {kind} ({name}) are NaN, infinite or too large: the file is "
                        "damaged; copy or download it again, or compress the source again"
                    )

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
            layer.w13_puzzle_grid if self.share.group_size else None,
            layer.w2_puzzle_grid if self.share.group_size else None,
        )


def _warn_of_halves(local: list[int], pairs: list[int]) -> None:
    """A pair takes its whole memory on each rank that has one of its experts.  Ranks of neighbouring experts cut two
    pairs at most, round robin cuts all."""
    here = set(local)
    halves = sum(not {2 * pair, 2 * pair + 1} <= here for pair in pairs)
    if halves > 2:
        logger.warning_once(
            "puzzlemoe: %d of this rank's %d pairs have an expert on another rank, which holds their words as well: "
            "--expert-placement-strategy linear keeps pairs together, in half the memory",
            halves,
            len(pairs),
        )
