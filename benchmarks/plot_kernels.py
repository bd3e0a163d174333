#!/usr/bin/env python3
"""Draws the results of benchmarks/kernels.py: speed over vLLM's bf16 kernel against tokens, one panel per model.

benchmarks/plot_kernels.py benchmarks/results/kernels-h100.json    writes the PNG beside it
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BASELINE = "vllm bf16"


def draw(results: dict, target: Path) -> None:
    """One panel per model in `results`, of its random routing."""
    models = list(dict.fromkeys(point["model"] for point in results["points"]))
    rows, columns = -(-len(models) // 3), min(3, len(models))
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.6 * rows), sharey=True, squeeze=False)
    for axis in axes.flat[len(models) :]:
        axis.axis("off")
    for axis, model in zip(axes.flat, models, strict=False):
        points = [p for p in results["points"] if p["model"] == model and p["routing"] == "random"]
        for contender in points[0]["microseconds"]:
            timed = [p for p in points if contender in p["microseconds"] and BASELINE in p["microseconds"]]
            speed = [p["microseconds"][BASELINE] / p["microseconds"][contender] for p in timed]
            width = 2.2 if contender.startswith("puzzlemoe") else 1.2
            axis.plot([p["tokens"] for p in timed], speed, marker=".", linewidth=width, label=contender)
        axis.set_xscale("log", base=2)
        axis.set_title(model)
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("speed over vLLM bf16")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, fontsize="small", frameon=False)
    figure.suptitle(f"One MoE layer, random routing, {results['machine']['device']}")
    figure.tight_layout(rect=(0, 0.14 / rows, 1, 1))
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    arguments = parser.parse_args()
    draw(json.loads(arguments.results.read_text()), arguments.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
