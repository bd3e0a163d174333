"""Prints the README's tables from the committed results.

python benchmarks/readme_tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 16384)


def load(name: str) -> Any:
    """A committed result."""
    return json.loads((RESULTS / name).read_text())


def accuracy() -> None:
    """Rise in perplexity over the dense model by recipe and text: mean over the seeds, and their range."""
    result = load("accuracy-mixtral-30m-cpu.json")
    dense = result["rows"][0]["perplexity"]
    print(f"| recipe, seeds | expert bytes | MB a token | {' | '.join(dense)} |")
    print("|---" * (3 + len(dense)) + "|")
    print(f"| dense | | | {' | '.join(f'{value:.2f}' for value in dense.values())} |")
    for recipe in dict.fromkeys(row["recipe"] for row in result["rows"][1:]):
        rows = [row for row in result["rows"] if row["recipe"] == recipe]
        rises = []
        for name, before in dense.items():
            each = [100 * (row["perplexity"][name] / before - 1) for row in rows]
            spread = f" ({min(each):.2f} to {max(each):.2f})" if len(each) > 1 else ""
            rises.append(f"{mean(each):+.2f}%{spread}")
        loads = [row["bytes_per_token"]["this pairing"] / 1e6 for row in rows if row["bytes_per_token"]]
        loaded = f"{mean(loads):.2f}" if loads else ""
        print(f"| {recipe}, {len(rows)} | {rows[0]['expert_bytes'] / 1e6:.1f} MB | {loaded} | {' | '.join(rises)} |")


def kernels() -> None:
    """Microseconds per layer for two models, each with bf16's time over it, and how much of a device copy's bandwidth
    the needed words were read at."""
    result = load("kernels-h100.json")
    for model in ("Mixtral-8x7B", "Qwen3-30B-A3B"):
        print(f"| {model}, tokens | vLLM bf16 | mask16 | angle8 | vLLM fp8 | vLLM int4 | mask16, angle8 of the floor |")
        print("|---" * 7 + "|")
        for point in result["points"]:
            if point["model"] != model or point["routing"] != "random" or point["tokens"] not in TOKENS:
                continue
            times, floors = point["microseconds"], point["floors"]
            bf16 = times["vllm bf16"]
            names = ("puzzlemoe mask16", "puzzlemoe angle8", "vllm fp8", "vllm int4 marlin")
            cells = [f"{times[name]:.0f} ({bf16 / times[name]:.2f}x)" for name in names]
            shares = ", ".join(f"{100 * floors[name] / times[name]:.0f}%" for name in names[:2])
            print(f"| {point['tokens']} | {bf16:.0f} | {' | '.join(cells)} | {shares} |")
        print()


def serving() -> None:
    """Whole models by kind of weights, with the ratio of bf16's decode step over each where bf16 fits the card."""
    for model in ("Qwen3-30B-A3B", "Mixtral-8x7B"):
        results = load(f"serving-{model.lower()}-h100.json")
        base = next((result["rows"] for result in results if result["weights"] == "bf16"), None)
        batches = [f"decode, batch {row['batch']}" for row in results[0]["rows"]]
        print(f"| {model} | weights | KV cache | {' | '.join(batches)} | prefill |")
        print("|---" * (4 + len(batches)) + "|")
        for result in results:
            steps = [f"{row['decode_step_ms']:.1f} ms" for row in result["rows"]]
            if base and result["rows"] is not base:
                ratios = [b["decode_step_ms"] / r["decode_step_ms"] for b, r in zip(base, result["rows"], strict=True)]
                steps = [f"{step} ({ratio:.2f}x)" for step, ratio in zip(steps, ratios, strict=True)]
            cells = [
                result["weights"],
                f"{result['weight_bytes'] / 1e9:.1f} GB",
                f"{result['kv_cache_tokens']:,} tokens",
            ]
            cells += [*steps, f"{result['rows'][-1]['prefill_tokens_per_second']:,.0f} tokens/s"]
            print(f"| {' | '.join(cells)} |")
        print()


COMPRESSIONS = {
    "mixtral-8x7b-default": "Mixtral-8x7B, `default`",
    "mixtral-8x7b-angle8": "Mixtral-8x7B, `default` with `--no-compensate`",
    "mixtral-8x7b": "Mixtral-8x7B, `paper`",
    "qwen3-30b-a3b": "Qwen3-30B-A3B, `paper`",
}


def compression() -> None:
    """Seconds of a layer that is not the first, and memory."""
    columns = ("calibration", "pairing", "merging and packing", "writing", "GPU memory at most")
    print(f"| layer, recipe, calibration tokens | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for name, label in COMPRESSIONS.items():
        file = f"compression-{name}-h100.json"
        result = load(file)
        seconds = result["layer_seconds"][-1]
        cells = [f"{seconds[stage]:.2f}" for stage in ("calibrate", "pair", "merge", "write")]
        cells.append(f"{result['peak_device_bytes'] / 1e9:.1f} GB")
        print(f"| [{label}](benchmarks/results/{file}), {result['calibration_tokens']:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    for table in (accuracy, kernels, serving, compression):
        table()
        print()
