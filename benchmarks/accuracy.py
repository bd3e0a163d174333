"""Perplexity, expert bytes and bytes per token of a model before and after compression, by recipe, text and seed.

python benchmarks/accuracy.py MODEL --calibration FILE --text FILE [FILE ...] --output results.json

Results are written after every model; run it again, with more recipes or seeds if you like, and it goes on from there.
A seed chooses the calibration windows and random partners.  A CPU computes in float32, a GPU in bf16: a rise is over
the dense model of the same file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from puzzlemoe_offline.calibration.text import load_calibration, text_tokens
from puzzlemoe_offline.methods.base import LayerMethod
from puzzlemoe_offline.methods.gptq import Gptq
from puzzlemoe_offline.methods.pairs import PairMethod
from puzzlemoe_offline.methods.single_trellis import SingleTrellis
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.run.job import Job
from puzzlemoe_offline.run.runner import run
from puzzlemoe_offline.score.compare import machine
from puzzlemoe_offline.score.perplexity import perplexity, spread, windows_of

RECIPES: dict[str, PairRecipe | LayerMethod] = {
    "paper, 50%": PairRecipe(),
    **{
        f"{code}, compensated": PairRecipe(code=code, compensate=True, pairing="search")
        for code in ("trellis8", "trellis6", "trellis5", "trellis4", "trellis3", "angle8")
    },
    **{
        f"{code}, compensated, down not corrected": PairRecipe(
            code=code, compensate=True, correct_down=False, pairing="search"
        )
        for code in ("trellis4", "trellis3", "angle8")
    },
    "angle8": PairRecipe(code="angle8", pairing="search"),
    "least squares": PairRecipe(rule="least-squares", pairing="search"),
    "angle16": PairRecipe(code="angle16", pairing="search"),
    "angle6": PairRecipe(code="angle6", pairing="search"),
    "angle6, compensated": PairRecipe(code="angle6", compensate=True, pairing="search"),
    "mask6": PairRecipe(code="mask6", pairing="search"),
    "paper, 25%": PairRecipe(sparsity=0.25),
    "paper, 50%, magnitude saliency": PairRecipe(saliency="magnitude"),
    "paper, 50%, search": PairRecipe(pairing="search"),
    "least squares, random pairing": PairRecipe(rule="least-squares"),
    "angle8, compensated, random pairing": PairRecipe(code="angle8", compensate=True),
    "angle8, compensated, balanced": PairRecipe(code="angle8", compensate=True, pairing="balanced"),
    "angle8, compensated, coactivation": PairRecipe(code="angle8", compensate=True, pairing="coactivation"),
    **{f"GPTQ int{bits}": Gptq(bits) for bits in (4, 3, 2)},
    **{f"trellis{bits}, two weights of one expert": SingleTrellis(bits) for bits in (8, 6, 4)},
}
"""What is compared; partners are searched for but where the title says otherwise, or is the paper's."""


def main() -> None:
    """Prints a line per model and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--recipe", choices=RECIPES, nargs="+", default=list(RECIPES))
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--windows", type=int, help="score this many windows of each text, evenly spaced; default all")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    model = LayerwiseModel(Checkpoint(arguments.model), arguments.device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = {
        path.stem: spread(windows_of(text_tokens(path, tokenizer).ids, arguments.sequence_length), arguments.windows)
        for path in arguments.text
    }
    result = started(arguments, texts)
    done = {(row["recipe"], row["seed"]) for row in result["rows"]}

    def score(scored: LayerwiseModel, row: dict[str, Any]) -> None:
        row["perplexity"] = {name: perplexity(scored, text).perplexity for name, text in texts.items()}
        result["rows"].append(row)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(row), flush=True)

    if ("dense", None) not in done:
        score(model, {"recipe": "dense", "seed": None})
    for seed in arguments.seed:
        calibration = load_calibration(
            arguments.calibration, tokenizer, arguments.samples, arguments.sequence_length, seed
        )
        for title in arguments.recipe:
            if (title, seed) in done:
                continue
            chosen = RECIPES[title]
            method = PairMethod(chosen.model_copy(update={"seed": seed})) if isinstance(chosen, PairRecipe) else chosen
            data = calibration if method.passes else None
            with tempfile.TemporaryDirectory() as out:
                tokens = data.tokens.numel() if data else 0
                job = Job(model, method, arguments.model.name, tokens=tokens)
                began = time.perf_counter()
                report = run(job, data, Path(out))
                row = {
                    "recipe": title,
                    "seed": seed,
                    "choices": method.choices(model.checkpoint),
                    "expert_bytes": report.bytes.experts_after if method.packs else stored_bytes(method, model),
                    "bytes_per_token": report.bytes_per_token if method.packs else None,
                    "seconds": time.perf_counter() - began,
                }
                score(LayerwiseModel(Checkpoint(Path(out)), arguments.device), row)


def stored_bytes(method: LayerMethod, model: LayerwiseModel) -> int:
    """What a method's own storage would take of the experts that it writes in bf16."""
    return round(model.checkpoint.routed_bytes / 16 * method.bits_per_weight(model.checkpoint))


def started(arguments: argparse.Namespace, texts: dict[str, Tensor]) -> dict[str, Any]:
    """The result so far; exits when the output file holds a different measurement."""
    setting = {
        "model": arguments.model.name,
        "calibration": Path(arguments.calibration).name,
        "calibration_tokens": arguments.samples * arguments.sequence_length,
        "sequence_length": arguments.sequence_length,
        "windows": {name: len(windows) for name, windows in texts.items()},
        "machine": machine(arguments.device),
        "torch": torch.__version__,
    }
    if not arguments.output.exists():
        return setting | {"rows": []}
    result: dict[str, Any] = json.loads(arguments.output.read_text())
    different = [key for key, value in setting.items() if result.get(key) != value]
    if different:
        sys.exit(f"{arguments.output} was measured with another {', '.join(different)}; give another --output")
    return result


if __name__ == "__main__":
    main()
