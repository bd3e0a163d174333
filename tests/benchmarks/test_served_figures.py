"""A server that fails, or answers only some prompts, gives no figures, and a row of the results says why."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

FIGURES = dict.fromkeys(("request_throughput", "output_throughput", "mean_ttft_ms", "mean_tpot_ms", "p99_tpot_ms"), 1.0)


@pytest.fixture
def modules(monkeypatch):
    """benchmarks/serving.py and end_to_end.py."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import end_to_end
    import serving

    yield serving, end_to_end
    del sys.modules["serving"], sys.modules["end_to_end"]


@pytest.fixture
def vllm(modules, tmp_path, monkeypatch):
    """Makes a command in the place of vLLM's: it answers so many prompts, says something on both of its outputs, and
    ends with that status."""

    def make(answered: int, status: int = 0, said: tuple[str, str] = ("", "")) -> None:
        script = tmp_path / "vllm"
        result = json.dumps({"model_id": "model", "completed": answered} | FIGURES)
        script.write_text(
            f"#!{sys.executable}\nimport sys\nwords = sys.argv\nif '--result-dir' in words:\n"
            f"    open(words[words.index('--result-dir') + 1] + '/result.json', 'w').write({result!r})\n"
            f"print({said[0]!r}, flush=True)\nprint({said[1]!r}, file=sys.stderr)\nsys.exit({status})\n"
        )
        script.chmod(0o755)
        for module in modules:
            monkeypatch.setattr(module, "VLLM", str(script))

    return make


def test_figures_of_prompts_that_all_were_answered(modules, vllm):
    vllm(answered=8)
    row = modules[0].measure_server("http://127.0.0.1:1", 2, 8)
    assert row == {"url": "http://127.0.0.1:1", "concurrency": 2, "model_id": "model"} | FIGURES


@pytest.mark.parametrize(
    ("answered", "status", "reason"), [(7, 0, "7 of 8 prompts of 2 clients"), (8, 3, "failed with status 3")]
)
def test_no_figures_of_others(modules, vllm, answered, status, reason):
    vllm(answered, status)
    with pytest.raises(modules[0].MeasurementError, match=reason):
        modules[0].measure_server("http://127.0.0.1:1", 2, 8)


def test_a_server_that_ends_is_a_row_with_its_last_words(modules, vllm, tmp_path):
    vllm(answered=8, status=1, said=("starting", "no room for it"))
    options = argparse.Namespace(port=1, tensor_parallel=1, expert_parallel=False, clients=[1])
    rows = modules[1].serve("mixtral-8x7b", "fp8", tmp_path, options)
    said = "vllm serve ended with status 1 before it answered: starting | no room for it"
    assert rows == [{"weights": "fp8", "failed": said}]


def test_weights_that_do_not_fit_are_a_row_that_says_so(modules, tmp_path, monkeypatch):
    (tmp_path / "layer.safetensors").write_bytes(bytes(3_000))
    memory = argparse.Namespace(total_memory=1_000)
    monkeypatch.setattr(modules[1].torch.cuda, "get_device_properties", lambda device: memory)
    options = argparse.Namespace(port=1, tensor_parallel=2, expert_parallel=False, clients=[1])
    [row] = modules[1].serve("mixtral-8x7b", "bf16", tmp_path, options)
    assert "do not fit" in row["failed"]
