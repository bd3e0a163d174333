"""Options that name texts: several weighted sources, columns, chats, and windows that the model has positions for."""

import gzip
import json
from pathlib import Path

import pytest
from support.command import puzzlemoe
from support.models import build

from puzzlemoe_offline.score.perplexity import Perplexity

TEXT = "It was the best of times, it was the worst of times. "
CHEAP = ["--sequence-length", "64", "--device", "cpu", "--recipe", "paper"]


@pytest.fixture
def source(tmp_path) -> Path:
    return build("mixtral", tmp_path / "source")


def report(out: Path) -> dict:
    return json.loads((out / "puzzlemoe_report.json").read_text())


def test_several_sources_share_the_samples_by_weight(source, tmp_path, capsys):
    chats, rows = tmp_path / "chats.jsonl", tmp_path / "rows.csv.gz"
    chats.write_text("".join(json.dumps({"messages": [{"role": "user", "content": TEXT}]}) + "\n" for _ in range(40)))
    with gzip.open(rows, "wt") as file:
        file.write("id,body\n" + f'1,"{TEXT * 40}"\n2,\n')
    plain = tmp_path / "plain.txt"
    plain.write_text(TEXT * 40)
    words = ["--calibration", f"{chats}=2", "--calibration", plain, "--samples", 9]
    assert puzzlemoe("compress", source, tmp_path / "out", *words, *CHEAP) == 0
    sources = report(tmp_path / "out")["calibration"]["sources"]
    assert [(each["name"], each["share"]) for each in sources] == [("chats.jsonl", 6), ("plain.txt", 3)]
    assert puzzlemoe("compress", source, tmp_path / "b", "--calibration", rows, "--samples", 4, *CHEAP) == 1
    assert "--column NAME" in capsys.readouterr().err
    words = ["--calibration", rows, "--column", "body", "--samples", 4]
    assert puzzlemoe("compress", source, tmp_path / "c", *words, *CHEAP) == 0
    assert "skipped 1 blank rows" in capsys.readouterr().err


def test_windows_are_no_longer_than_the_model_s_positions(source, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 60)
    too_long = ["--text", text, "--sequence-length", "513"]
    assert puzzlemoe("perplexity", source, *too_long) == 1
    assert "--sequence-length 513 is longer than the model's 512 positions" in " ".join(capsys.readouterr().err.split())
    assert puzzlemoe("compress", source, tmp_path / "out", "--calibration", text, "--sequence-length", "513") == 1
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert puzzlemoe("perplexity", source, "--text", text, "--json") == 0
    assert json.loads(capsys.readouterr().out)["sequence_length"] == 512


def test_vllm_is_left_a_position_for_the_token_that_it_generates(source, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 60)

    def served(folder, windows, *options):
        return Perplexity(1.0, *windows.shape, windows.numel())

    monkeypatch.setattr("puzzlemoe_offline.cli.perplexity.served_perplexity", served)
    assert puzzlemoe("perplexity", source, "--text", text, "--engine", "vllm", "--json") == 0
    assert json.loads(capsys.readouterr().out)["sequence_length"] == 511


def test_a_source_that_is_none_is_refused_by_a_dry_run_too(source, tmp_path, capsys):
    words = ["--calibration", tmp_path / "absent.txt", "--dry-run"]
    assert puzzlemoe("compress", source, tmp_path / "out", *words, *CHEAP) == 1
    assert "absent.txt: no such file" in " ".join(capsys.readouterr().err.split())
