"""Perplexity and expert bytes of a model before and after compression, for a few recipes.

python benchmarks/accuracy.py MODEL --calibration FILE --text FILE [--text FILE] [--output results.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from puzzlemoe_offline.calibrate import load_calibration
from puzzlemoe_offline.checkpoint import Checkpoint
from puzzlemoe_offline.compress import Job, compress
from puzzlemoe_offline.evaluate import perplexity, windows_of
from puzzlemoe_offline.recipe import Recipe

RECIPES = {
    "paper, 50%": Recipe(),
    "paper, 25%": Recipe(sparsity=0.25),
    "paper, 50%, magnitude saliency": Recipe(saliency="magnitude"),
}


def main() -> None:
    """Prints a line per recipe and text; JSON with --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    checkpoint, tokenizer = Checkpoint(arguments.model), AutoTokenizer.from_pretrained(arguments.model)
    calibration = load_calibration(arguments.calibration, tokenizer, arguments.samples, arguments.sequence_length)
    texts = {
        path.stem: windows_of(tokenizer(path.read_text())["input_ids"], arguments.sequence_length)
        for path in arguments.text
    }
    rows: list[dict[str, Any]] = []

    def score(title: str, scored: Checkpoint, expert_bytes: int, seconds: float | None) -> None:
        measured = {name: perplexity(scored, text, arguments.device).perplexity for name, text in texts.items()}
        rows.append({"recipe": title, "expert_bytes": expert_bytes, "seconds": seconds, "perplexity": measured})
        print(json.dumps(rows[-1]), flush=True)

    for title, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as out:
            data = calibration if recipe.saliency == "wanda" else None
            job = Job(checkpoint, arguments.model.name, None, recipe, data, arguments.device)
            began = time.perf_counter()
            report = compress(job, Path(out), False, lambda *_: None)
            seconds = time.perf_counter() - began
            if not rows:
                score("dense", checkpoint, report["bytes"]["experts_before"], None)
            score(title, Checkpoint(Path(out)), report["bytes"]["experts_after"], seconds)
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    if arguments.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    result = {
        "model": arguments.model.name,
        "calibration_tokens": calibration.tokens.numel(),
        "sequence_length": arguments.sequence_length,
        "machine": machine,
        "torch": torch.__version__,
        "rows": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
