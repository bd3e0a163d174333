"""`puzzlemoe perplexity`: how well a dense or packed model predicts a text."""

from __future__ import annotations

import dataclasses
import json
from enum import StrEnum
from typing import Annotated

import typer

from puzzlemoe_offline.cli.options import (
    DEFAULT_DEVICE,
    ColumnOption,
    Device,
    Model,
    OptionError,
    TextOption,
    WindowOption,
)
from puzzlemoe_offline.cli.terminal import console, layer_progress
from puzzlemoe_offline.cli.texts import window_length, windows_to_score
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.hub import locate
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.score.perplexity import perplexity
from puzzlemoe_offline.score.served import served_perplexity


class Engine(StrEnum):
    """What computes a perplexity."""

    layerwise = "layerwise"
    vllm = "vllm"


def perplexity_command(
    model: Model,
    text: TextOption,
    column: ColumnOption = None,
    sequence_length: WindowOption = None,
    engine: Annotated[
        Engine, typer.Option(help="layerwise: one layer in memory at a time; vllm: the model as vLLM serves it.")
    ] = Engine.layerwise,
    device: Annotated[Device | None, typer.Option(help="Where layers run; vLLM chooses its own.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="vllm: let it run code that the folder brings (DeepSeek-MoE).")
    ] = False,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="vllm: share of the GPU's memory to take; its own default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a line.")] = False,
) -> None:
    """Perplexity of a packed or dense model on a text, in non-overlapping windows as is usual for WikiText-2."""
    by_vllm = engine is Engine.vllm
    if by_vllm and device:
        raise OptionError("--device is for --engine layerwise; vLLM runs where its build runs: drop it")
    if not by_vllm and (trust_remote_code or gpu_memory_utilization):
        raise OptionError("--trust-remote-code and --gpu-memory-utilization are for --engine vllm: drop them")
    folder = locate(model).folder
    # The model as vLLM would serve it is checked too: vLLM does not miss what a checkpoint lacks.
    layers = LayerwiseModel(Checkpoint(folder), Device.cpu if by_vllm else (device or DEFAULT_DEVICE).usable())
    # vLLM generates a token after every window, and wants a position for it.
    length = window_length(layers.checkpoint, sequence_length, spare=1 if by_vllm else 0)
    windows = windows_to_score(layers.checkpoint, text, length, column)
    if by_vllm:
        result = served_perplexity(folder, windows, trust_remote_code, gpu_memory_utilization)
    else:
        with layer_progress("perplexity", layers.checkpoint.layers) as advance:
            result = perplexity(layers, windows, advance)
    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        console.print(
            f"perplexity {result.perplexity:.4f} over {result.tokens} tokens "
            f"({result.windows} windows of {result.sequence_length})"
        )
