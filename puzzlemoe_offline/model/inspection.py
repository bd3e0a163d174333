"""What a model folder holds, how large its parts are, and whether it is whole."""

from __future__ import annotations

from collections import Counter
from typing import Any

from puzzlemoe_offline.model.checkpoint import Checkpoint, LayerTensors
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_vllm.format.layout import STEPS, WORDS
from puzzlemoe_vllm.format.shards import changed_files, check_digests, has_digests


def inspect(checkpoint: Checkpoint, quick: bool = False) -> dict[str, Any]:
    """Sizes in bytes per part, which parts are copied, pairs or clusters, and the recipe.

    Reads every tensor, and compares every shard with its digest where the index has digests; `quick` leaves it at
    headers.  `checked` says which it was: headers, values, or digests (and values).  `changed_files`: those beside the
    shards that are not as they were written.
    Raises UserError naming the first file that is not what was written, or the first tensor that is missing, misshapen,
    of a wrong dtype, not finite, or none of the model's.
    """
    LayerwiseModel(checkpoint, "cpu")  # checks that it is whole
    digests = not quick and has_digests(checkpoint.folder)
    if digests:
        check_digests(checkpoint.folder)
    if not quick:
        _read_everything(checkpoint)
    sizes: Counter[str] = Counter()
    for name in checkpoint.outside:
        sizes["head" if name.startswith("lm_head") else "embedding and final norm"] += checkpoint.nbytes(name)
    for index in range(checkpoint.layers):
        tensors = checkpoint.layer(index)
        for name in tensors.experts:
            sizes[_expert_part(checkpoint, index, name)] += checkpoint.nbytes(name)
        for name in tensors.plain:
            sizes[_plain_part(checkpoint, tensors, name)] += checkpoint.nbytes(name)
    for name, part in checkpoint.copied.items():
        sizes[part] += checkpoint.nbytes(name)
    packed = checkpoint.quantization
    return {
        "model_type": checkpoint.config["model_type"],
        "layers": checkpoint.layers,
        "moe_layers": len(checkpoint.moe_layers),
        "experts_per_layer": checkpoint.experts,
        "experts_per_token": checkpoint.experts_per_token,
        "pairs": sum(packed.merged_experts.values()) // 2 if packed else 0,
        "clusters": sum(len(set(centres)) for centres in packed.clusters.values()) if packed else 0,
        "copied": sorted(set(checkpoint.copied.values())),
        "bytes": dict(sorted(sizes.items())),
        "checked": "headers" if quick else "digests" if digests else "values",
        "changed_files": changed_files(checkpoint.folder),
        "total_bytes": sum(sizes.values()),
        "code": packed.code if packed and packed.merged_experts else None,
        "provenance": packed.provenance.model_dump() if packed and packed.provenance else None,
    }


def _read_everything(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a tensor that is not finite."""
    for index in range(checkpoint.layers):
        for name in checkpoint.layer(index).plain:
            checkpoint.plain_tensor(name)
        if checkpoint.layer(index).block:
            for expert in sorted({checkpoint.centre(index, expert) for expert in range(checkpoint.experts)}):
                checkpoint.expert(index, expert)
    for name in checkpoint.outside:
        checkpoint.plain_tensor(name)
    for name in checkpoint.copied:
        checkpoint.tensor(name)


def _expert_part(checkpoint: Checkpoint, layer: int, name: str) -> str:
    if name.endswith((f".{WORDS}", f".{STEPS}")):
        return "experts, merged"
    clustered = checkpoint.quantization and layer in checkpoint.quantization.clusters
    return "experts, in clusters" if clustered else "experts, dense"


ATTENTION = (".self_attn.", ".linear_attn.", ".conv.")
"""What names of tensors contain that mix tokens."""


def _plain_part(checkpoint: Checkpoint, layer: LayerTensors, name: str) -> str:
    if any(mixer in name for mixer in ATTENTION):
        return "attention"
    below = name.removeprefix(f"{layer.block}.")
    if checkpoint.family.shared and below.startswith(checkpoint.family.shared):
        return "shared experts"
    return "routers" if below in checkpoint.family.router else "dense MLPs and norms"
