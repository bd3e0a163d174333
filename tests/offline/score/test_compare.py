"""compare and baseline from the command line: the table, the files, and one clear error for what cannot be run."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from support.command import puzzlemoe
from support.models import build

from puzzlemoe_offline.methods import BASELINES
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.recipe import named_recipe
from puzzlemoe_offline.run.files import OutputError
from puzzlemoe_offline.run.output import ModelFolder
from puzzlemoe_offline.score.compare import CONTENDERS, TAU_SWEEP, Contender, Row

TEXT = "It was the best of times, it was the worst of times. "
CHEAP = ["--samples", "16", "--sequence-length", "64", "--device", "cpu"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny Mixtral with text.txt to calibrate and score on."""
    folder = build("mixtral", tmp_path_factory.mktemp("compare") / "tiny")
    (folder.parent / "text.txt").write_text(TEXT * 40)
    return folder


def compare(source: Path, output: Path, *words: object) -> int:
    text = source.parent / "text.txt"
    return puzzlemoe("compare", source, "--text", text, "--calibration", text, "--output", output, *CHEAP, *words)


def test_the_table_and_its_files(source, tmp_path, capsys):
    output = tmp_path / "result.json"
    only = ["angle8", "mergemoe-50", "mergemoe-25", "int8", "drop-50", "paper-3"]
    assert compare(source, output, *(word for name in only for word in ("--only", name))) == 0
    result = json.loads(output.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["dense", *sorted(only, key=list(CONTENDERS).index)]
    weights = 2 * 8 * 3 * 128 * 96
    assert {name: row["bits_per_weight"] for name, row in rows.items()} == pytest.approx(
        # angle8 has groups of 32 columns for all; int8's are 128 for gate and up, 32 for down.
        {"dense": 16, "angle8": 4 + 16 / 32 / 2, "int8": 8 + 24 * (2 / 128 + 1 / 32) / 3, "drop-50": 8, "paper-3": 6.5}
        # MergeMoE leaves 4 or 6 of 8 experts, in bf16.
        | {"mergemoe-50": 8, "mergemoe-25": 12}
    )
    for row in rows.values():
        assert row["expert_bytes"] == pytest.approx(row["bits_per_weight"] * weights / 8, abs=1)
        assert len(row["perplexity"]["text"]) == 1
    scores = {name: row["perplexity"]["text"][0] for name, row in rows.items()}
    assert scores["int8"] == pytest.approx(scores["dense"], rel=0.05)
    assert abs(scores["angle8"] - scores["dense"]) < abs(scores["paper-3"] - scores["dense"])
    assert result["model"] == "tiny" and result["calibration"]["windows"] == 16
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "result.png"]
    shown = capsys.readouterr().out
    assert all(name in shown for name in only)


def test_seeds_give_a_spread_where_pairs_are_random(source, tmp_path):
    output = tmp_path / "result.json"
    assert compare(source, output, "--only", "paper", "--only", "int4", "--seeds", "2") == 0
    rows = {row["name"]: row for row in json.loads(output.read_text())["rows"]}
    first, second = rows["paper"]["perplexity"]["text"]
    assert first != second
    assert len(rows["int4"]["perplexity"]["text"]) == 1
    row = Row(**rows["paper"])
    assert row.mean("text") == pytest.approx((first + second) / 2)
    assert row.spread("text") == pytest.approx(abs(first - second) / 2)


def test_the_tau_sweep_runs_the_papers_rule_at_each_threshold(source, tmp_path, monkeypatch):
    ends = {tau: TAU_SWEEP[tau] for tau in (0.0, 1.0)}
    monkeypatch.setattr("puzzlemoe_offline.cli.compare.TAU_SWEEP", ends)
    output = tmp_path / "tau.json"
    assert compare(source, output, "--tau-sweep") == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "tau 0.0", "tau 1.0"]
    assert rows[1]["perplexity"] != rows[2]["perplexity"]
    assert output.with_suffix(".png").exists()
    model = Checkpoint(source)
    for tau, contender in TAU_SWEEP.items():
        assert contender.method(model, 0).recipe == named_recipe("paper", tau=tau)


def test_what_does_not_fit_a_model_is_said_and_the_rest_runs(source, tmp_path):
    small = build("mixtral", tmp_path / "small", num_local_experts=2)
    (tmp_path / "text.txt").write_text(TEXT * 40)
    only = ["mergemoe-25", "mergemoe-50", "drop-50", "int3"]
    assert compare(small, tmp_path / "r.json", *(word for name in only for word in ("--only", name))) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert "every token needs 2" in rows["drop-50"]["refused"]
    # A quarter of two experts is none.
    assert "has 2 experts per layer; choose 1 to 1" in rows["mergemoe-25"]["refused"]
    assert rows["mergemoe-50"]["refused"] is None and rows["mergemoe-50"]["bits_per_weight"] == 8
    assert rows["int3"]["refused"] is None and rows["int3"]["perplexity"]["text"]


def test_a_row_that_fails_loses_no_other(source, tmp_path, monkeypatch):
    def failing(error: Exception) -> Contender:
        def method(checkpoint, seed):
            raise error

        return Contender(method)

    rows = {
        "memory": failing(torch.cuda.OutOfMemoryError("CUDA out of memory")),
        "folder": failing(OutputError("no room")),
        "int8": CONTENDERS["int8"],
    }
    monkeypatch.setattr("puzzlemoe_offline.cli.compare.CONTENDERS", rows)
    assert compare(source, tmp_path / "r.json") == 0
    dense, memory, folder, int8 = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert (memory["refused"], folder["refused"]) == ("CUDA out of memory", "no room")
    assert dense["perplexity"]["text"] and int8["perplexity"]["text"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_comparison_leaves_no_model(source, tmp_path, capsys, monkeypatch, number):
    monkeypatch.setattr(ModelFolder, "finish", lambda *words: os.kill(os.getpid(), number))
    assert compare(source, tmp_path / "r.json", "--only", "int8") == 128 + number
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.png"]


def test_a_full_disk_is_no_reason_to_resume_a_comparison(source, tmp_path, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("puzzlemoe_offline.run.output.record_shard", full)
    assert compare(source, tmp_path / "r.json", "--only", "int8") == 0
    refused = json.loads((tmp_path / "r.json").read_text())["rows"][1]["refused"]
    assert "No space left" in refused and "--resume" not in refused


def test_models_in_the_making_do_not_go_into_the_source(source, capsys):
    assert compare(source, source / "r.json", "--only", "int8") == 1
    assert "r.json: lies inside the source" in capsys.readouterr().err
    assert not (source / "r.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "int5"], "--only int5: unknown; choose from paper, "),
        (["--tau-sweep", "--only", "paper"], "drop --only"),
        (["--output", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (["--output", "result.png"], "name the .json file"),
    ],
)
def test_options_that_cannot_be(words, message, source, tmp_path, capsys):
    assert compare(source, tmp_path / "r.json", *words) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "message"), [(b"\xff\xfe", "UTF-8"), (b"", "fewer than two tokens")])
def test_a_text_that_cannot_be_scored_is_named(content, message, source, tmp_path, capsys):
    (tmp_path / "bad.txt").write_bytes(content)
    assert compare(source, tmp_path / "r.json", "--text", tmp_path / "bad.txt") == 1
    shown = capsys.readouterr().err
    assert "bad.txt" in shown.replace("\n", "") and message in shown.replace("\n", " ")


def test_two_texts_of_one_name_are_an_error(source, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    assert compare(source, tmp_path / "r.json", "--text", tmp_path / "text.txt") == 1
    assert "two files have the same name" in " ".join(capsys.readouterr().err.split())


def test_windows_are_spread_over_the_text(source, tmp_path):
    assert compare(source, tmp_path / "r.json", "--only", "int8", "--windows", "3") == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["texts"]["text"] == {"windows": 3, "tokens": 3 * 64}


def test_baseline_writes_a_model(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert puzzlemoe("baseline", source, out, "--method", "int4") == 0
    assert Checkpoint(out).experts == 8
    assert "4.312 bits per expert weight" in " ".join(capsys.readouterr().out.split())


def test_an_unknown_baseline_is_an_error(source, tmp_path, capsys):
    assert puzzlemoe("baseline", source, tmp_path / "out", "--method", "int5") == 1
    assert f"choose one of {', '.join(BASELINES)}" in " ".join(capsys.readouterr().err.split())


def test_only_what_draws_random_numbers_runs_under_every_seed(source):
    model = Checkpoint(source)
    for name in ("angle8", "paper-3"):
        assert CONTENDERS[name].random
        assert CONTENDERS[name].method(model, 1) != CONTENDERS[name].method(model, 2)
    for name in ("gptq-int4", "default", "mergemoe-50"):
        assert not CONTENDERS[name].random
