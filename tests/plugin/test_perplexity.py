"""Perplexity through vLLM agrees with that of the layer-by-layer runner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.engine import EngineError
from support.without import run
from typer.testing import CliRunner

from puzzlemoe_offline.cli.main import app

WINDOW = 128


def puzzlemoe(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def text(example, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((example / "heldout.txt").read_text()[:20_000])
    return path


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_both_engines_agree(kind, compiling_engine, example, packed_example, text):
    """float32 layers against vLLM's bf16; a trained model, so that a shift by one token would show."""
    model = packed_example if kind == "packed" else example / "model"
    command = ["perplexity", model, "--text", text, "--sequence-length", WINDOW, "--json"]
    expected = json.loads(puzzlemoe(*command))
    found = json.loads(compiling_engine.puzzlemoe(*command, "--engine", "vllm"))
    assert found.pop("perplexity") == pytest.approx(expected.pop("perplexity"), rel=0.01)
    assert found == expected
    assert found["windows"] > 20


def test_windows_that_leave_no_position_are_refused(engine, example, text):
    command = ["perplexity", example / "model", "--text", text, "--engine", "vllm", "--sequence-length", "1024"]
    with pytest.raises(EngineError, match=r"ServingError: .*vLLM does not serve it with --sequence-length 1024"):
        engine.puzzlemoe(*command)


@pytest.mark.without_vllm
def test_without_vllm(example, text):
    arguments = ["perplexity", str(example / "model"), "--text", str(text), "--engine", "vllm"]
    done = run(f"sys.argv[1:] = {arguments!r}\nfrom puzzlemoe_offline.cli.main import main\nmain()")
    assert done.returncode == 1
    assert "--engine vllm needs vLLM" in done.stderr and "--engine layerwise" in done.stderr


@pytest.mark.without_vllm
def test_a_device_for_vllm_is_refused(example, text):
    with pytest.raises(ValueError, match="--device is for --engine layerwise"):
        puzzlemoe("perplexity", example / "model", "--text", text, "--engine", "vllm", "--device", "cpu")
