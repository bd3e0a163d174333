"""Recipes and baselines on one model: what each takes, and what each costs in perplexity."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor

from puzzlemoe_offline.calibration.text import Calibration
from puzzlemoe_offline.methods import METHODS
from puzzlemoe_offline.methods.base import BaselineError, Method
from puzzlemoe_offline.methods.dropping import remaining
from puzzlemoe_offline.methods.merge_three import MergeThree
from puzzlemoe_offline.model.checkpoint import Checkpoint, CheckpointError
from puzzlemoe_offline.recipe import NAMED, Recipe
from puzzlemoe_offline.run.compress import Job, compress
from puzzlemoe_offline.run.write_baseline import write_baseline
from puzzlemoe_offline.score.perplexity import perplexity
from puzzlemoe_offline.version import VERSION
from puzzlemoe_vllm.format.codes import UnencodableWeight


@dataclass(frozen=True)
class MergeMoe:
    """MergeMoE on any model.  sparsity: share of every layer's experts that goes by merging."""

    sparsity: float

    def recipe(self, checkpoint: Checkpoint) -> Recipe:
        """The recipe for a model, whose number of experts decides that of clusters."""
        return Recipe(method="mergemoe", experts=remaining(checkpoint.experts, self.sparsity))


Contender = Recipe | MergeMoe | Method

RECIPES: dict[str, Recipe] = {
    name: Recipe.model_validate(fields)
    for name, fields in {
        "paper": NAMED["paper"],
        "default": NAMED["default"],
        "least-squares": {"code": "mask16", "rule": "least-squares"},
        "angle16": {"code": "angle16"},
        "angle8": {"code": "angle8"},
        "angle8-compensated": {"code": "angle8", "compensate": True},
        "angle6": {"code": "angle6"},
        "angle6-compensated": {"code": "angle6", "compensate": True},
        "mask6": {"code": "mask6"},
    }.items()
}
"""By the name that the table shows; partners are random in all but `default`."""

CONTENDERS: dict[str, Contender] = {
    **RECIPES,
    "mergemoe-50": MergeMoe(0.5),
    "mergemoe-25": MergeMoe(0.25),
    **METHODS,
}
"""What `puzzlemoe compare` runs, by the name that --only takes; the number after mergemoe, as after drop and hc-smoe,
is the percentage of experts that goes."""

TAU_SWEEP = {f"tau {tenth / 10}": RECIPES["paper"].model_copy(update={"tau": tenth / 10}) for tenth in range(11)}
"""The paper's rule from sharing only equal magnitudes to sharing all (Fig. 5)."""


@dataclass(frozen=True)
class Row:
    """What one contender takes and costs.

    bits_per_weight: of a routed expert's weights in the contender's own storage; expert_bytes: that, over the model.
    perplexity: by text, one for each seed.  seconds: writing the model, mean over the seeds; None for the dense model.
    refused: why the model cannot be treated so; perplexity is empty then.
    """

    name: str
    bits_per_weight: float
    expert_bytes: int
    perplexity: dict[str, list[float]]
    seconds: float | None = None
    refused: str | None = None

    def mean(self, text: str) -> float:
        """Mean perplexity over the seeds."""
        return mean(self.perplexity[text])

    def spread(self, text: str) -> float:
        """Standard deviation of the perplexity over the seeds that were run."""
        return pstdev(self.perplexity[text])


@dataclass(frozen=True)
class Comparison:
    """One model, its calibration, and the texts [windows, T] by name on which it is scored.

    scratch: folder in which each contender's model is written, scored and deleted.
    """

    checkpoint: Checkpoint
    calibration: Calibration
    texts: dict[str, Tensor]
    device: str
    scratch: Path

    def rows(self, contenders: Mapping[str, Contender], seeds: int = 1) -> Iterator[Row]:
        """The dense model, then each contender.  Raises what reading the source raises."""
        weights = expert_weights(self.checkpoint)
        yield Row("dense", 16.0, 2 * weights, {name: [value] for name, value in self._score(self.checkpoint).items()})
        for name, contender in contenders.items():
            try:
                yield self._row(name, contender, seeds, weights)
            except (BaselineError, CheckpointError, UnencodableWeight) as error:
                yield Row(name, 0.0, 0, {}, refused=str(error))

    def _row(self, name: str, contender: Contender, seeds: int, weights: int) -> Row:
        scores: dict[str, list[float]] = {text: [] for text in self.texts}
        seconds, bits = [], 0.0
        for variant in variants(contender, seeds):
            with TemporaryDirectory(dir=self.scratch, prefix="puzzlemoe-compare-") as folder:
                began = time.perf_counter()
                bits = self._write(variant, Path(folder), weights)
                seconds.append(time.perf_counter() - began)
                for text, value in self._score(Checkpoint(Path(folder))).items():
                    scores[text].append(value)
        return Row(name, bits, round(bits * weights / 8), scores, mean(seconds))

    def _write(self, contender: Contender, out: Path, weights: int) -> float:
        """Writes a contender's model; returns the bits per weight of its experts."""
        if isinstance(contender, MergeMoe):
            contender = contender.recipe(self.checkpoint)
        if isinstance(contender, Recipe):
            job = Job(self.checkpoint, str(self.checkpoint.folder), None, contender, self.calibration, self.device)
            report = compress(job, out, False, lambda layer, record: None)
            return 8 * report["bytes"]["experts_after"] / weights
        write_baseline(self.checkpoint, contender, self.calibration, self.device, out)
        return contender.bits_per_weight(self.checkpoint)

    def _score(self, checkpoint: Checkpoint) -> dict[str, float]:
        return {name: perplexity(checkpoint, windows, self.device).perplexity for name, windows in self.texts.items()}


def variants(contender: Contender, seeds: int) -> list[Contender]:
    """The contender under seeds 0 .. seeds - 1, or alone when it draws no random numbers."""
    if isinstance(contender, Recipe) and contender.pairing == "random":
        return [contender.model_copy(update={"seed": seed}) for seed in range(seeds)]
    if isinstance(contender, MergeThree):
        return [dataclasses.replace(contender, seed=seed) for seed in range(seeds)]
    return [contender]


def expert_weights(checkpoint: Checkpoint) -> int:
    """Number of weights in all routed experts."""
    hidden, intermediate = checkpoint.expert_sizes
    return 3 * hidden * intermediate * checkpoint.experts * len(checkpoint.moe_layers)


def machine(device: str) -> dict[str, Any]:
    """What figures depend on of the machine that a run's device is in."""
    facts: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    return facts | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def results(comparison: Comparison, rows: list[Row], seeds: int) -> dict[str, Any]:
    """The comparison as JSON data: model, settings, machine, versions, rows; seconds, bytes, bits."""
    calibration = comparison.calibration
    return {
        "model": comparison.checkpoint.folder.resolve().name,
        "calibration": {
            "source": Path(calibration.source).name,
            "windows": calibration.tokens.shape[0],
            "sequence_length": calibration.tokens.shape[1],
            "sha256": calibration.digest,
        },
        "texts": {name: {"windows": len(text), "tokens": text.numel()} for name, text in comparison.texts.items()},
        "seeds": seeds,
        "machine": machine(comparison.device),
        "versions": {"puzzlemoe-vllm": VERSION, "torch": torch.__version__, "transformers": transformers.__version__},
        "rows": [dataclasses.asdict(row) for row in rows],
    }
