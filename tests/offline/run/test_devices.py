"""Several devices, here all the CPU: the bytes of one, in order, and an end that is as clean."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.kills import contents
from support.command import puzzlemoe
from support.models import build
from support.runs import SENTENCE, job_of

from puzzlemoe_offline.calibration.statistics import ExpertStatistics
from puzzlemoe_offline.methods.base import LayerRecord, MethodError, NewLayer
from puzzlemoe_offline.methods.pairs import PairMethod
from puzzlemoe_offline.model.layer_experts import SourceLayer
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.run import plan, runner
from puzzlemoe_offline.run.devices import WAITING, ObservedLayer, in_order, most_begun, moved
from puzzlemoe_offline.run.files import OutputError
from puzzlemoe_offline.run.job import Job
from puzzlemoe_offline.run.output import ModelFolder

LAYERS = 6
METHODS = {
    "pairs": ["compress", "--pairing", "search"],
    "magnitude": ["compress", "--recipe", "paper", "--saliency", "magnitude"],
    "mergemoe": ["compress", "--method", "mergemoe", "--clusters", "2"],
    "gptq-int3": ["baseline", "--method", "gptq-int3"],
    "hc-smoe-50": ["baseline", "--method", "hc-smoe-50"],
    "drop-25": ["baseline", "--method", "drop-25"],
}
PAPER = ["compress", "--recipe", "paper"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    (folder / "text.txt").write_text(SENTENCE * 60)
    return build("mixtral", folder / "source", num_hidden_layers=LAYERS)


@pytest.fixture
def others(monkeypatch) -> Callable[[int], None]:
    """Has runs take so many devices beside the first."""
    return lambda count: monkeypatch.setattr(runner, "other_gpus", lambda device: ["cpu"] * count)


def command(source: Path, out: Path, words: list[str], *more: object) -> list[object]:
    sizes = ["--samples", "8", "--sequence-length", "64", "--device", "cpu"]
    return [words[0], source, out, "--calibration", source.parent / "text.txt", *words[1:], *sizes, *more]


@pytest.mark.parametrize("words", METHODS.values(), ids=METHODS)
def test_several_write_the_bytes_and_the_report_of_one(words, source, others, tmp_path):
    assert puzzlemoe(*command(source, tmp_path / "one", words)) == 0
    for count in (1, 3):
        others(count)
        out = tmp_path / str(count)
        assert puzzlemoe(*command(source, out, words)) == 0
        assert contents(out) == contents(tmp_path / "one")
        report = json.loads((out / "puzzlemoe_report.json").read_text())
        assert report["devices"] == 1 + count and report["seconds"]["wait"] >= 0


def test_layers_without_experts_keep_their_place(others, tmp_path):
    source = build("deepseek_v2", tmp_path / "source")
    (tmp_path / "text.txt").write_text(SENTENCE * 60)
    assert puzzlemoe(*command(source, tmp_path / "one", PAPER)) == 0
    others(2)
    assert puzzlemoe(*command(source, tmp_path / "several", PAPER)) == 0
    assert contents(tmp_path / "several") == contents(tmp_path / "one")


class Merges:
    """Layers that are merged only when a test lets them: `begun` and `allowed` by the layer's number."""

    def __init__(self, layers: int):
        self.begun = [threading.Event() for _ in range(layers)]
        self.allowed = [threading.Event() for _ in range(layers)]
        self.by: dict[int, str] = {}
        self.observed: list[int] = []

    def layers(self) -> Iterator[ObservedLayer]:
        for index in range(len(self.begun)):
            self.observed.append(index)
            yield ObservedLayer(index, SourceLayer(None, index, "first"), index, torch.tensor(index), {"load": 1.0})

    def merge(self, layer: SourceLayer, seen: int) -> NewLayer:
        assert seen == layer.index
        self.by[seen] = layer.device
        self.begun[seen].set()
        assert self.allowed[seen].wait(60)
        return NewLayer({"number": torch.tensor(seen)}, LayerRecord(layer=seen))


def test_the_first_device_merges_what_the_others_cannot_take():
    merges, got = Merges(5), []
    for index in (2, 4):  # which the first is to take itself
        merges.allowed[index].set()
    made = in_order(merges.layers(), merges.merge, ["cpu:0"])
    taker = threading.Thread(target=lambda: got.extend(made))
    taker.start()
    assert merges.begun[0].wait(60) and merges.begun[2].wait(60)
    # Layer 0 is with the other, 1 waits, 2 was merged by the first; 3 is calibrated, and then it is too many.
    deadline = time.monotonic() + 60
    while len(merges.observed) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert merges.observed == [0, 1, 2, 3] and not got and not merges.begun[1].is_set()
    for event in merges.allowed:
        event.set()
    taker.join(60)
    assert [(int(new.tensors["number"]), int(states)) for new, states in got] == [(i, i) for i in range(5)]
    assert merges.by[0] == merges.by[1] == "cpu:0" and merges.by[2] == merges.by[3] == "first"
    assert all(set(new.record.seconds) == {"load", "merge", "wait"} for new, _ in got)


def test_no_more_than_so_many_are_begun(source, others, tmp_path, monkeypatch):
    """The first of all takes longest: those after it are done, and wait."""
    others(2)
    write, merge, zeros = ModelFolder.write_shard, PairMethod.merge, ExpertStatistics.zeros
    written: list[int] = []
    begun: list[int] = []
    ahead: list[int] = []

    def writing(self: ModelFolder, shard: int, *words: Any, **named: Any) -> None:
        written.append(shard)
        write(self, shard, *words, **named)

    def merging(self: PairMethod, layer: SourceLayer, seen: Any) -> NewLayer:
        if layer.index == 0:
            time.sleep(1)
        return merge(self, layer, seen)

    def beginning(*words: Any) -> ExpertStatistics:
        begun.append(len(begun))
        ahead.append(len(begun) - len(written))
        return zeros(*words)

    monkeypatch.setattr(ModelFolder, "write_shard", writing)
    monkeypatch.setattr(PairMethod, "merge", merging)
    monkeypatch.setattr(ExpertStatistics, "zeros", beginning)
    assert puzzlemoe(*command(source, tmp_path / "out", PAPER)) == 0
    assert written == list(range(LAYERS + 1))
    assert 2 + WAITING < max(ahead) <= most_begun(2) + 1


@pytest.fixture(scope="module")
def packed(source) -> Path:
    """What one device writes."""
    assert puzzlemoe(*command(source, source.parent / "packed", PAPER)) == 0
    return source.parent / "packed"


def finished(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*.safetensors"))


def test_an_error_of_another_device_ends_the_run_as_on_one(source, packed, others, tmp_path, monkeypatch, capsys):
    merge = PairMethod.merge

    def failing(self: PairMethod, layer: SourceLayer, seen: Any) -> NewLayer:
        if layer.index == 1:
            raise MethodError("layer 1: cannot be merged")
        time.sleep(0.2 if layer.index == 0 else 0)
        return merge(self, layer, seen)

    for count in (0, 1, 2):
        others(count)
        out = tmp_path / str(count)
        with monkeypatch.context() as patch:
            patch.setattr(PairMethod, "merge", failing)
            assert puzzlemoe(*command(source, out, PAPER)) == 1
        assert capsys.readouterr().err.splitlines()[-1] == "error: layer 1: cannot be merged"
        assert finished(out) == [f"model-00001-of-{LAYERS + 1:05d}.safetensors"]
        assert puzzlemoe(*command(source, out, PAPER, "--resume")) == 0
        assert contents(out) == contents(packed)


def test_an_error_in_calibrating_comes_after_the_layers_before(source, packed, others, tmp_path, monkeypatch, capsys):
    merge, observe = PairMethod.merge, PairMethod.observe

    def slow(self: PairMethod, layer: SourceLayer, seen: Any) -> NewLayer:
        time.sleep(0.3)
        return merge(self, layer, seen)

    def failing(self: PairMethod, layer: SourceLayer, passes: Any) -> Any:
        if layer.index == 2:
            raise MethodError("layer 2: cannot be calibrated")
        return observe(self, layer, passes)

    others(2)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(PairMethod, "merge", slow)
        patch.setattr(PairMethod, "observe", failing)
        assert puzzlemoe(*command(source, out, PAPER)) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: layer 2: cannot be calibrated"
    assert len(finished(out)) == 2
    assert puzzlemoe(*command(source, out, PAPER, "--resume")) == 0
    assert contents(out) == contents(packed)


@pytest.mark.parametrize("where", ["merge", "write"])
def test_a_run_that_ends_gives_up_what_waits(where, source, packed, others, tmp_path, monkeypatch):
    """Ctrl-C while another device merges, or an error of the disk: layers under way end, no other begins."""
    merge, write = PairMethod.merge, ModelFolder.write_shard
    begun: list[int] = []
    ended: list[int] = []

    def slow(self: PairMethod, layer: SourceLayer, seen: Any) -> NewLayer:
        if threading.current_thread() is threading.main_thread():
            return merge(self, layer, seen)
        begun.append(layer.index)
        if where == "merge" and layer.index >= 2:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        new = merge(self, layer, seen)
        ended.append(layer.index)
        return new

    def full(self: ModelFolder, shard: int, *words: Any, **named: Any) -> None:
        if where == "write" and shard == 1:
            raise OutputError("no room")
        write(self, shard, *words, **named)

    others(1)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(PairMethod, "merge", slow)
        patch.setattr(ModelFolder, "write_shard", full)
        assert puzzlemoe(*command(source, out, PAPER)) == (130 if where == "merge" else 1)
    assert begun == ended and len(begun) < LAYERS
    assert where == "write" or sum(index >= 2 for index in begun) == 1
    assert puzzlemoe(*command(source, out, PAPER, "--resume")) == 0
    assert contents(out) == contents(packed)


def test_tensors_are_moved_wherever_they_are():
    statistics = ExpertStatistics.zeros(2, 4, 4, torch.device("cpu"), moments=True)
    value = {"seen": (statistics, [torch.ones(2)]), "name": "layer"}
    found = moved(value, "meta")
    assert found["name"] == "layer" and found["seen"][0].tokens is statistics.tokens  # the CPU's stay
    assert found["seen"][0] is not statistics and found["seen"][1][0].device.type == "cpu"


def test_a_plan_has_the_first_calibrate_and_all_merge(source, monkeypatch):
    job = job_of(source, PairMethod(PairRecipe(code="angle8", compensate=True, correct_down=False)))
    weights = job.checkpoint.routed_bytes / 2
    for calibrating, others, seconds in ((0.0, 3, 5.0), (20.0, 3, 20.0), (20.0, 1, 20.0), (20.0, 0, 40.0)):
        tokens = round(calibrating * 1e6)
        with monkeypatch.context() as patch:
            patch.setattr(plan, "other_gpus", lambda device, others=others: ["cpu"] * others)
            patch.setattr(plan, "_merge_rate", lambda job, method: weights / 20)
            for rate in ("_product_rate", "_moments_rate"):
                patch.setattr(plan, rate, lambda device: 2 * _operations(job) * 1e6)
            made = plan.make_plan(replace(job, tokens=tokens))
        assert made.devices == 1 + others
        assert made.seconds == pytest.approx(seconds, rel=0.01)


def test_a_plan_corrects_down_projections_where_it_merges(source, monkeypatch):
    monkeypatch.setattr(plan, "_product_rate", lambda device: 1e6)
    monkeypatch.setattr(plan, "_moments_rate", lambda device: 1e6)
    monkeypatch.setattr(plan, "_merge_rate", lambda job, method: 1e12)
    made = {}
    for others in (0, 3):
        monkeypatch.setattr(plan, "other_gpus", lambda device, others=others: ["cpu"] * others)
        for correct in (False, True):
            recipe = PairRecipe(code="angle8", compensate=True, correct_down=correct)
            made[others, correct] = plan.make_plan(replace(job_of(source, PairMethod(recipe)), tokens=10**6))
    # The other devices take that work from the one that calibrates, and moments of hidden values as well.
    assert made[0, True].seconds > made[0, False].seconds and made[3, True].seconds < made[3, False].seconds


def _operations(job: Job) -> float:
    """Products and sums, halved, that a token of calibration takes."""
    checkpoint = job.checkpoint
    active = checkpoint.routed_bytes / checkpoint.experts * checkpoint.experts_per_token + checkpoint.other_bytes
    chosen = checkpoint.experts_per_token * len(checkpoint.moe_layers)
    return active / 2 + chosen * sum(size**2 for size in checkpoint.expert_sizes)
