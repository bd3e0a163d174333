"""Prints the README's tables from the committed results.

python benchmarks/readme_tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
TOKENS = (1, 4, 8, 32, 128, 256, 1024, 4096, 16384)


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
    """Microseconds per layer for two models, with the ratio to bf16 and the rate at which needed bytes were read."""
    result = load("kernels-h100.json")
    for model in ("Mixtral-8x7B", "Qwen3-30B-A3B"):
        print(f"| {model}, tokens | ours | vLLM bf16 | ratio | vLLM fp8 | vLLM int4 | ours, TB/s of needed words |")
        print("|---|---|---|---|---|---|---|")
        for point in result["points"]:
            if point["model"] != model or point["routing"] != "random" or point["tokens"] not in TOKENS:
                continue
            times = point["microseconds"]
            ours, bf16 = times["puzzlemoe mask16"], times["vllm bf16"]
            rate = point["floors"]["puzzlemoe mask16"] * result["copy_bandwidth"] / ours / 1e12
            print(
                f"| {point['tokens']} | {ours:.0f} | {bf16:.0f} | {bf16 / ours:.2f} | {times['vllm fp8']:.0f} | "
                f"{times['vllm int4 marlin']:.0f} | {rate:.2f} |"
            )
        print()


def tuning() -> None:
    """Microseconds per layer of the fastest CUDA kernel, by code, as `kernels.py --tune` printed them."""
    fastest: dict[tuple[str, str, int], float] = {}
    for line in (RESULTS / "tune-h100.txt").read_text().splitlines():
        if found := re.match(r"(\w+) (\S+) +(\d+) tokens, .* per expert: (.*)", line):
            code, model, tokens, times = found.groups()
            fastest[code, model, int(tokens)] = min(map(float, times.split()[1::2]))
    models = ("Mixtral-8x7B", "Qwen3-30B-A3B")
    print("| tokens | " + " | ".join(f"{model}, {code}" for model in models for code in ("mask16", "angle8")) + " |")
    print("|---" * 5 + "|")
    for tokens in TOKENS:
        cells = [f"{fastest[code, model, tokens]:.0f}" for model in models for code in ("mask16", "angle8")]
        print(f"| {tokens} | " + " | ".join(cells) + " |")


def serving() -> None:
    """Mixtral on one card."""
    for result in load("serving-mixtral-8x7b-h100.json"):
        weights, cache = result["weight_bytes"] / 1e9, result["kv_cache_tokens"]
        print(f"{weights:.1f} GB of weights, KV cache for {cache:,} tokens;")
        steps = ", ".join(f"{row['decode_step_ms']:.1f} ms at batch {row['batch']}" for row in result["rows"])
        print(f"decode step {steps}; prefill {result['rows'][-1]['prefill_tokens_per_second']:,.0f} tokens/s.")


def compression() -> None:
    """Seconds and memory of one layer."""
    for name in ("mixtral-8x7b", "qwen3-30b-a3b"):
        result = load(f"compression-{name}-h100.json")
        seconds = result["seconds"]
        print(
            f"{result['model']}: {seconds['calibrate']:.1f} s calibration, {seconds['merge']:.1f} s merging and "
            f"packing, {result['peak_device_bytes'] / 1e9:.1f} GB of GPU memory at most."
        )


if __name__ == "__main__":
    for table in (accuracy, kernels, tuning, serving, compression):
        table()
        print()
