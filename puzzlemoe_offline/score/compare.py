"""Recipes and baselines on one model: what each takes, and what each costs in perplexity."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor

from puzzlemoe_offline.calibration.text import Calibration
from puzzlemoe_offline.methods import BASELINES
from puzzlemoe_offline.methods.base import LayerMethod
from puzzlemoe_offline.methods.dropping import remaining
from puzzlemoe_offline.methods.merge_three import MergeThree
from puzzlemoe_offline.methods.mergemoe import MergeMoe
from puzzlemoe_offline.methods.pairs import PairMethod
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.recipe import ClusterRecipe, Pairing, PairRecipe, named_recipe
from puzzlemoe_offline.run.job import Job
from puzzlemoe_offline.run.runner import run
from puzzlemoe_offline.score.perplexity import perplexity
from puzzlemoe_offline.version import VERSION
from puzzlemoe_vllm.errors import UserError
from puzzlemoe_vllm.format.codes import CODES, TrellisCode


@dataclass(frozen=True)
class Contender:
    """A row of the comparison.  method: for a model and a seed; random: whether the seed changes anything."""

    method: Callable[[Checkpoint, int], LayerMethod]
    random: bool = False


def _pairs(recipe: PairRecipe) -> Contender:
    def method(checkpoint: Checkpoint, seed: int) -> LayerMethod:
        return PairMethod(recipe.model_copy(update={"seed": seed}))

    return Contender(method, random=recipe.pairing == "random")


def _mergemoe(sparsity: float) -> Contender:
    def method(checkpoint: Checkpoint, seed: int) -> LayerMethod:
        return MergeMoe(ClusterRecipe(clusters=remaining(checkpoint.experts, sparsity)))

    return Contender(method)


def _baseline(method: LayerMethod) -> Contender:
    return Contender(lambda checkpoint, seed: method)


def _codes() -> dict[str, Contender]:
    """Every code but the paper's, as it is and, where the words have steps, compensated; trellises, which are slow to
    find and live on partners that share bits, compensated and searched only."""
    found = {}
    for name, code in CODES.items():
        if not code.rules and not isinstance(code, TrellisCode):
            found[name] = _pairs(PairRecipe(code=name))
        if code.has_steps:
            pairing: Pairing = "search" if isinstance(code, TrellisCode) else "random"
            found[f"{name}-compensated"] = _pairs(PairRecipe(code=name, compensate=True, pairing=pairing))
    return found


CONTENDERS: dict[str, Contender] = {
    "paper": _pairs(named_recipe("paper")),
    "default": _pairs(named_recipe("default")),
    "least-squares": _pairs(named_recipe("paper", rule="least-squares")),
    **_codes(),
    "mergemoe-50": _mergemoe(0.5),
    "mergemoe-25": _mergemoe(0.25),
    **{name: _baseline(method) for name, method in BASELINES.items()},
    "paper-3": Contender(lambda checkpoint, seed: MergeThree(seed=seed), random=True),
}
"""What `puzzlemoe compare` runs, by the name that the table shows and --only takes; partners are random in all recipes
but `default` and the trellises.  The number after mergemoe, drop and hc-smoe is the percentage of experts that goes."""

TAU_SWEEP = {tenth / 10: _pairs(named_recipe("paper", tau=tenth / 10)) for tenth in range(11)}
"""The paper's rule from sharing only equal magnitudes to sharing all (Fig. 5), by threshold."""


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

    model: LayerwiseModel
    calibration: Calibration
    texts: dict[str, Tensor]
    scratch: Path

    def rows(self, contenders: Mapping[str, Contender], seeds: int = 1) -> Iterator[Row]:
        """The dense model, then each contender; one that cannot be run is a row that says why."""
        weights = expert_weights(self.model.checkpoint)
        yield Row("dense", 16.0, 2 * weights, {name: [value] for name, value in self._score(self.model).items()})
        for name, contender in contenders.items():
            try:
                yield self._row(name, contender, seeds, weights)
            except (UserError, torch.cuda.OutOfMemoryError) as error:
                yield Row(name, 0.0, 0, {}, refused=str(error))

    def _row(self, name: str, contender: Contender, seeds: int, weights: int) -> Row:
        scores: dict[str, list[float]] = {text: [] for text in self.texts}
        checkpoint, seconds, bits = self.model.checkpoint, [], 0.0
        for seed in range(seeds if contender.random else 1):
            method = contender.method(checkpoint, seed)
            bits = method.bits_per_weight(checkpoint)
            with TemporaryDirectory(dir=self.scratch, prefix="puzzlemoe-compare-") as folder:
                began = time.perf_counter()
                job = Job(self.model, method, checkpoint.folder.name, tokens=self.calibration.tokens.numel())
                report = run(job, self.calibration if method.passes else None, Path(folder))
                assert report, "a fresh folder cannot be finished already"
                seconds.append(time.perf_counter() - began)
                if method.packs:  # experts that suit no partner stay dense
                    bits = 8 * report.bytes.experts_after / weights
                written = LayerwiseModel(Checkpoint(Path(folder)), str(self.model.device))
                for text, value in self._score(written).items():
                    scores[text].append(value)
        return Row(name, bits, round(bits * weights / 8), scores, mean(seconds))

    def _score(self, model: LayerwiseModel) -> dict[str, float]:
        return {name: perplexity(model, windows).perplexity for name, windows in self.texts.items()}


def expert_weights(checkpoint: Checkpoint) -> int:
    """Number of weights in all routed experts."""
    hidden, intermediate = checkpoint.expert_sizes
    return 3 * hidden * intermediate * checkpoint.experts * len(checkpoint.moe_layers)


def machine(device: str) -> dict[str, Any]:
    """What figures depend on of the machine that a run's device is in."""
    facts: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    return facts | ({"gpu": torch.cuda.get_device_name()} if torch.device(device).type == "cuda" else {})


def results(comparison: Comparison, rows: list[Row], seeds: int) -> dict[str, Any]:
    """The comparison as JSON data: model, settings, machine, versions, rows; seconds, bytes, bits."""
    calibration = comparison.calibration
    return {
        "model": comparison.model.checkpoint.folder.resolve().name,
        "calibration": {
            "source": Path(calibration.source).name,
            "windows": calibration.tokens.shape[0],
            "sequence_length": calibration.tokens.shape[1],
            "sha256": calibration.digest,
        },
        "texts": {name: {"windows": len(text), "tokens": text.numel()} for name, text in comparison.texts.items()},
        "seeds": seeds,
        "machine": machine(str(comparison.model.device)),
        "versions": {"puzzlemoe-vllm": VERSION, "torch": torch.__version__, "transformers": transformers.__version__},
        "rows": [dataclasses.asdict(row) for row in rows],
    }
