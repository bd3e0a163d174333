"""A compression run on the example model: what it writes, and that a killed one goes on where it stopped."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from support import command
from typer.testing import CliRunner

from puzzlemoe_offline.calibration.statistics import ExpertStatistics
from puzzlemoe_offline.cli.main import app
from puzzlemoe_offline.methods import mergemoe
from puzzlemoe_offline.methods.pairs import PairMethod
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.inspection import inspect
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.model.weight_files import CheckpointError
from puzzlemoe_offline.run.output import ModelFolder

STAGES = ["start", "text", "embed", "load", "calibrate", "pair", "merge", "write", "finish"]
OPTIONS = ["--recipe", "paper", "--samples", "8", "--sequence-length", "128", "--seed", "3"]


def puzzlemoe(*words: object) -> subprocess.CompletedProcess[str]:
    """Runs the command line tool in this process, as fixtures may, too."""
    out, errors, wide = io.StringIO(), io.StringIO(), mock.patch.dict(os.environ, {"COLUMNS": "200"})
    with wide, redirect_stdout(out), redirect_stderr(errors):
        status = command.puzzlemoe(*words)
    return subprocess.CompletedProcess(words, status, out.getvalue(), errors.getvalue())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def packed(example, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "half"
    done = puzzlemoe("compress", example / "model", out, "--calibration", example / "calibration.txt", *OPTIONS)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def quarter(example, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "quarter"
    options = ["--calibration", example / "calibration.txt", "--sparsity", "0.25", *OPTIONS]
    done = puzzlemoe("compress", example / "model", out, *options)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("recipe", [["--recipe", "default"], ["--method", "mergemoe", "--clusters", "4"]])
def test_memory_holds_one_layer_at_a_time(example, tmp_path, monkeypatch, recipe):
    """Nothing that a layer gathered or that is to be written of it lives on when the next layer begins."""
    made: list[weakref.ref] = []
    alive = []

    def watching(function: Callable, parts: Callable[[Any], Iterable[object]]) -> Callable:
        def watched(*args, **options):
            result = function(*args, **options)
            made.extend(map(weakref.ref, parts(result)))
            return result

        return watched

    real_layers = LayerwiseModel.layers

    def layers(*args):
        for index_and_layer in real_layers(*args):
            alive.append(sum(reference() is not None for reference in made))
            yield index_and_layer

    monkeypatch.setattr(LayerwiseModel, "layers", layers)
    zeros = watching(ExpertStatistics.zeros, lambda statistics: [statistics])
    monkeypatch.setattr(ExpertStatistics, "zeros", zeros)
    monkeypatch.setattr(mergemoe, "LayerMerger", watching(mergemoe.LayerMerger, lambda merger: [merger]))
    monkeypatch.setattr(PairMethod, "merge", watching(PairMethod.merge, lambda new: new.tensors.values()))
    words = ["compress", example / "model", tmp_path / "out", "--calibration", example / "calibration.txt", *recipe]
    done = CliRunner().invoke(app, [*map(str, words), "--samples", "4", "--sequence-length", "128"])
    assert done.exit_code == 0, done.output
    assert len(made) >= len(alive) > 1
    assert alive == [0] * len(alive)


def test_the_folder_is_complete(packed, example):
    names = {path.name for path in packed.iterdir()}
    assert {"config.json", "README.md", "puzzlemoe_report.json", "model.safetensors.index.json"} <= names
    assert {path.name for path in (example / "model").glob("*.json")} <= names
    assert not [name for name in names if name.startswith(".")]
    index = json.loads((packed / "model.safetensors.index.json").read_text())
    tensors = tensors_of(packed)
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert all((packed / file).stat().st_mode & 0o044 for file in names if file.endswith(".safetensors"))
    provenance = json.loads((packed / "config.json").read_text())["quantization_config"]["provenance"]
    assert provenance["recipe"]["seed"] == 3
    assert provenance["calibration"]["samples"] == 8
    assert "vllm serve" in (packed / "README.md").read_text()


def test_expert_bytes_are_halved_and_the_rest_is_untouched(packed, example):
    before, after = (inspect(Checkpoint(folder)) for folder in (example / "model", packed))
    assert 2 * after["bytes"]["experts, merged"] == before["bytes"]["experts, dense"]
    assert after["pairs"] == 4 * 4
    source, written = tensors_of(example / "model"), tensors_of(packed)
    plain = [name for name in source if ".experts." not in name and ".gate." not in name]
    assert plain
    for name in plain:
        assert torch.equal(source[name], written[name]), name


def test_router_rows_follow_the_experts(packed, example):
    source, written = tensors_of(example / "model"), tensors_of(packed)
    for layer in json.loads((packed / "puzzlemoe_report.json").read_text())["layers"]:
        name = f"model.layers.{layer['layer']}.block_sparse_moe.gate.weight"
        assert torch.equal(written[name], source[name][layer["order"]])
        assert layer["order"] != sorted(layer["order"])


def test_a_quarter_keeps_the_most_used_experts_as_they_are(quarter, example):
    source, written = tensors_of(example / "model"), tensors_of(quarter)
    for layer in json.loads((quarter / "puzzlemoe_report.json").read_text())["layers"]:
        assert layer["merged"] == 4
        kept = layer["order"][4:]
        assert min(layer["tokens"][expert] for expert in kept) >= max(layer["tokens"][e] for e in layer["order"][:4])
        experts = f"model.layers.{layer['layer']}.block_sparse_moe.experts"
        for new, old in enumerate(kept, 4):
            for projection in ("w1", "w2", "w3"):
                dense = written[f"{experts}.{new}.{projection}.weight"]
                assert torch.equal(dense, source[f"{experts}.{old}.{projection}.weight"])


def test_the_report_measures_what_was_lost(packed, quarter):
    half, less = (json.loads((folder / "puzzlemoe_report.json").read_text()) for folder in (packed, quarter))
    assert half["bytes"]["experts_after"] * 2 == half["bytes"]["experts_before"]
    assert less["bytes"]["experts_after"] * 4 == less["bytes"]["experts_before"] * 3
    assert list(half["seconds"]) == STAGES
    for layer, kinder in zip(half["layers"], less["layers"], strict=True):
        assert sum(layer["tokens"]) == 8 * 128 * 2
        assert all(0.1 < error < 0.5 for error in layer["weight_error"])
        assert 0 < kinder["output_error"] < layer["output_error"] < 0.6


def test_the_stages_leave_no_gap(example, tmp_path, monkeypatch):
    plain_tensor = Checkpoint.plain_tensor

    def slow(self: Checkpoint, name: str) -> torch.Tensor:
        time.sleep(0.02)
        return plain_tensor(self, name)

    monkeypatch.setattr(Checkpoint, "plain_tensor", slow)
    began = time.perf_counter()
    done = puzzlemoe(
        "compress", example / "model", tmp_path / "out", "--calibration", example / "calibration.txt", *OPTIONS
    )
    whole = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "puzzlemoe_report.json").read_text())
    assert 0.9 * whole < sum(report["seconds"].values()) < whole
    for stage in ("load", "calibrate", "pair", "merge", "write"):
        assert report["seconds"][stage] == pytest.approx(sum(layer["seconds"][stage] for layer in report["layers"]))
    layers, plain = len(report["layers"]), len(Checkpoint(example / "model").layer(0).plain)
    assert report["seconds"]["load"] > 2 * layers * plain * 0.02  # for the model, and to be written
    assert report["seconds"]["finish"] > 0.02 * len(Checkpoint(example / "model").outside)


def test_a_dry_run_writes_nothing(example, tmp_path):
    out = tmp_path / "out"
    options = ["--calibration", example / "calibration.txt", *OPTIONS, "--dry-run"]
    done = puzzlemoe("compress", example / "model", out, *options)
    assert done.returncode == 0
    assert "6.3 MB -> 3.1 MB" in done.stdout
    assert "peak host memory" in done.stdout
    assert not out.exists()


def test_a_killed_run_resumes_to_the_same_bytes(packed, example, tmp_path):
    out = tmp_path / "out"
    words = ["compress", example / "model", out, "--calibration", example / "calibration.txt", *OPTIONS]
    process = subprocess.Popen(
        [sys.executable, "-m", "puzzlemoe_offline", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(out.glob("model-00001-*")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "config.json").exists()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Checkpoint(out)
    again = puzzlemoe(*words)
    assert again.returncode == 1
    assert "--resume" in again.stderr
    other = puzzlemoe(*words, "--resume", "--tau", "0.3")
    assert other.returncode == 1
    assert "another source, recipe or calibration" in other.stderr
    resumed = puzzlemoe(*words, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    whole, pieced = tensors_of(packed), tensors_of(out)
    assert whole.keys() == pieced.keys()
    assert all(torch.equal(whole[name], pieced[name]) for name in whole)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in packed.iterdir())


def test_a_run_that_ends_after_its_last_layer_resumes_too(packed, example, tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    words = ["compress", example / "model", tmp_path / "out", "--calibration", example / "calibration.txt", *OPTIONS]
    with monkeypatch.context() as patch:
        patch.setattr(ModelFolder, "finish", killed)
        assert CliRunner().invoke(app, list(map(str, words))).exit_code != 0
    done = CliRunner().invoke(app, [*map(str, words), "--resume"])
    assert done.exit_code == 0, done.exception
    whole, pieced = tensors_of(packed), tensors_of(tmp_path / "out")
    assert whole.keys() == pieced.keys() and all(torch.equal(whole[name], pieced[name]) for name in whole)


def test_magnitude_saliency_needs_no_calibration(example, tmp_path):
    out = tmp_path / "out"
    done = puzzlemoe("compress", example / "model", out, "--recipe", "paper", "--saliency", "magnitude")
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "puzzlemoe_report.json").read_text())
    assert report["calibration"] is None
    assert all("output_error" not in layer for layer in report["layers"])
    assert json.loads((out / "config.json").read_text())["quantization_config"]["provenance"]["calibration"] is None


def test_perplexity_of_packed_and_unpacked_agree_and_stay_near_dense(packed, example, tmp_path):
    def run(*words: object) -> str:
        """Here, without a process for every command."""
        done = CliRunner().invoke(app, list(map(str, words)))
        assert done.exit_code == 0, done.output
        return done.stdout

    unpacked = tmp_path / "unpacked"
    run("unpack", packed, unpacked)
    scores = {}
    for name, folder in (("dense", example / "model"), ("packed", packed), ("unpacked", unpacked)):
        text = tmp_path / "text.txt"
        text.write_text((example / "heldout.txt").read_text()[:40_000])
        printed = run("perplexity", folder, "--text", text, "--sequence-length", "256", "--json")
        scores[name] = json.loads(printed)["perplexity"]
    assert scores["packed"] == pytest.approx(scores["unpacked"], rel=1e-5)
    assert scores["dense"] < scores["packed"] < 4 * scores["dense"]


def test_the_default_takes_half_the_paper_s_bytes_and_loses_less(packed, example, tmp_path):
    out = tmp_path / "out"
    options = ["--calibration", example / "calibration.txt", *OPTIONS[2:]]
    done = puzzlemoe("compress", example / "model", out, *options)
    assert done.returncode == 0, done.stderr
    default, paper = (json.loads((folder / "puzzlemoe_report.json").read_text()) for folder in (out, packed))
    assert default["recipe"]["code"] == "angle8" and default["recipe"]["compensate"]
    assert default["bytes"]["experts_after"] < 0.52 * paper["bytes"]["experts_after"]
    for layer, other in zip(default["layers"], paper["layers"], strict=True):
        assert layer["output_error"] < 0.7 * other["output_error"]
    assert "one token loads" in done.stdout


def test_options_that_contradict_the_recipe_are_one_line(example, tmp_path):
    done = puzzlemoe("compress", example / "model", tmp_path / "out", "--saliency", "magnitude")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: compensation needs calibration: use --saliency wanda, or --no-compensate"
    ]
