"""Runs of the offline tool without its command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from puzzlemoe_offline.calibration.text import Calibration, load_calibration
from puzzlemoe_offline.methods.base import LayerMethod
from puzzlemoe_offline.methods.pairs import PairMethod
from puzzlemoe_offline.methods.unpack import Unpack
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.fp8_layers import fp8_weights
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.model.tokenizer import tokenizer_of
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.run.job import Job
from puzzlemoe_offline.run.runner import run

SENTENCE = "It was the best of times, it was the worst of times. "


def job_of(source: Path, method: LayerMethod, calibration: Calibration | None = None, dense: str = "bf16") -> Job:
    """A run on the CPU."""
    tokens, model = calibration.tokens.numel() if calibration else 0, LayerwiseModel(Checkpoint(source), "cpu")
    fp8 = fp8_weights(model.checkpoint) if dense == "fp8" else frozenset()
    return Job(model, method, "source", tokens=tokens, fp8=fp8)


def run_method(
    source: Path, out: Path, method: LayerMethod, calibration: Calibration | None = None, dense: str = "bf16"
) -> dict[str, Any]:
    """Runs a method on the CPU; the report as puzzlemoe_report.json has it."""
    report = run(job_of(source, method, calibration, dense), calibration if method.passes else None, out)
    return json.loads(report.text())


def compress_pairs(source: Path, out: Path, calibration: Calibration | None = None, **recipe: Any) -> dict[str, Any]:
    """Merges in pairs, by the paper's recipe but for the fields given; by magnitude without calibration."""
    if calibration is None:
        recipe = {"saliency": "magnitude"} | recipe
    return run_method(source, out, PairMethod(PairRecipe(**recipe)), calibration)


def unpack(packed: Path, out: Path) -> None:
    """Reconstructs a packed model."""
    run_method(packed, out, Unpack())


def sentences(source: Path, samples: int, length: int) -> Calibration:
    """Calibration windows of a short English text, in the tokens of a tiny model."""
    text = source / "text.txt"
    text.write_text(SENTENCE * 60)
    return load_calibration(str(text), tokenizer_of(source), samples, length)
