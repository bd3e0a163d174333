"""Linear layers outside routed experts that are written in FP8: which they are, and their tensors."""

from __future__ import annotations

import re
from collections import defaultdict

import torch
from torch import Tensor

from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.fp8 import Fp8Error
from puzzlemoe_vllm.errors import shown
from puzzlemoe_vllm.format.fp8 import FP8_BLOCK, quantize

TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("q_b_proj",),
    ("kv_b_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
    ("in_proj_qkvz",),
    ("in_proj_qkv", "in_proj_z"),
    ("out_proj",),
)
"""Linear layers that may be in FP8, by the names that families have for them; those of a row are one layer to vLLM, in
that order, and are all in FP8 or none.  vLLM holds others in bf16 whatever config.json says, e.g. gates of shared
experts."""


def fp8_weights(checkpoint: Checkpoint) -> frozenset[str]:
    """Names of the weights that are written in FP8: those of `TOGETHER` that the source has in FP8 by blocks, or whose
    rows and columns are whole blocks.  Of layers that are one to vLLM, only the last may end within a block.  Routers,
    and all outside the decoder's layers, are not among them.

    Raises Fp8Error when there are none.
    """
    found: set[str] = set()
    for index in range(checkpoint.layers):
        router = checkpoint.router(index)
        found |= _of_layer(checkpoint, [name for name in checkpoint.layer(index).plain if name not in router])
    if not found:
        raise Fp8Error(
            f"{shown(checkpoint.folder, 200)}: no linear layer outside experts has multiples of {FP8_BLOCK} as rows "
            "and columns, so none can be in FP8: drop --dense fp8"
        )
    return frozenset(found)


def _of_layer(checkpoint: Checkpoint, names: list[str]) -> set[str]:
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        if match := re.fullmatch(r"(.*)\.(\w+)\.weight", name):
            modules[match[1]][match[2]] = name
    found: set[str] = set()
    for weights in modules.values():
        for group in TOGETHER:
            together = [weights[layer] for layer in group if layer in weights]
            cut = any(checkpoint.shape(name)[0] % FP8_BLOCK for name in together[:-1])
            if not cut and all(checkpoint.in_blocks(name) or _fits(checkpoint, name) for name in together):
                found |= set(together)
    return found


def _fits(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a weight has whole blocks only."""
    shape = checkpoint.shape(name)
    return len(shape) == 2 and all(size % FP8_BLOCK == 0 for size in shape)


def fp8_tensors(checkpoint: Checkpoint, name: str) -> tuple[Tensor, Tensor]:
    """An FP8 weight [N, K] and its scales, float32: the source's where it has them by blocks, or else new ones.

    Raises CheckpointError as `Checkpoint.plain_tensor` does.
    """
    weights = checkpoint.plain_tensor(name)
    if checkpoint.in_blocks(name):
        return checkpoint.stored(name), checkpoint.scale(name).float()
    return quantize(weights.to(torch.bfloat16))


def fp8_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of an FP8 weight of that shape and its scales."""
    rows, columns = (-(-size // FP8_BLOCK) for size in shape)
    return shape[0] * shape[1] + 4 * rows * columns
