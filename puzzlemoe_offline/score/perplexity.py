"""Perplexity of a dense or packed checkpoint, layer by layer, on reconstructed weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzlemoe_offline.model.layer_experts import LayerExperts
from puzzlemoe_offline.model.layerwise import LayerwiseModel

LOGIT_TOKENS = {"cpu": 256, "cuda": 2048}
"""Tokens whose logits are in memory at once: few enough that a CPU's cache holds much of them, enough to keep a GPU
busy."""


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log likelihood) over `tokens` predicted tokens in `windows` windows."""

    perplexity: float
    windows: int
    sequence_length: int
    tokens: int


def windows_of(ids: Tensor, sequence_length: int) -> Tensor:
    """Non-overlapping windows [n, sequence_length] of token ids [m]; the tail is dropped, as is usual for WikiText-2.

    A text of two tokens or more that is shorter than one window becomes one short window.
    """
    length = min(sequence_length, len(ids))
    return ids[: len(ids) // length * length].view(-1, length)


def spread(windows: Tensor, count: int | None) -> Tensor:
    """`count` of the windows [n, T] at even distances, or all of them when there are no more or `count` is None."""
    if count is None or count >= len(windows):
        return windows
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()]


@torch.inference_mode()
def perplexity(
    model: LayerwiseModel, windows: Tensor, on_layer: Callable[[int], None] = lambda layer: None
) -> Perplexity:
    """windows: token ids [n, T].  Each window is scored on its own, its first token only conditions."""
    device = str(model.device)
    size = model.batch_size(windows.shape[1])
    states = model.embed_all(windows, size)
    for index, layer in model.layers(LayerExperts(model.checkpoint, device)):
        layer.advance(states, states, size, device)
        on_layer(index)
    # The last token of a window predicts none of it; what is below zero is not scored.
    targets = torch.cat([windows[:, 1:], torch.full((len(windows), 1), -100)], dim=1).flatten()
    total, at_once = 0.0, LOGIT_TOKENS[model.device.type]
    for some, following in zip(states.flatten(0, 1).split(at_once), targets.split(at_once), strict=True):
        logits = model.logits(some.to(device))
        total += float(F.cross_entropy(logits, following.to(device), ignore_index=-100, reduction="sum"))
    count, length = windows.shape
    tokens = count * (length - 1)
    return Perplexity(math.exp(total / tokens), count, length, tokens)
