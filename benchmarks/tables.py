"""Writes the tables of README.md and docs/results.md from the committed results.

python benchmarks/tables.py

A table stands between two comments, `<!-- table NAME -->` and `<!-- end of table -->`, in either file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from serving import PROMPT

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "results.md")
COMPARED = (
    *("dense", "default", "paper", "least-squares", "angle8-compensated", "trellis6-compensated"),
    *("trellis4-compensated", "angle6-compensated", "mergemoe-50", "mergemoe-25", "int8", "int4", "int3", "int2"),
    *("gptq-int4", "gptq-int3", "gptq-int2", "wanda-2:4", "drop-50", "drop-25", "hc-smoe-50", "hc-smoe-25", "paper-3"),
)
"""Rows of the comparison that the table shows."""


LAYERS = ("Mixtral-8x7B", "Qwen3-30B-A3B", "Qwen3-Next-80B-A3B", "GLM-4.5-Air", "MiniMax-M2", "DeepSeek-V3")
"""Models whose layers were timed."""


def load(name: str) -> Any:
    """A committed result."""
    return json.loads((RESULTS / name).read_text())


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def accuracy(file: str) -> str:
    """Rise in perplexity over the dense model by recipe and text: mean over the seeds, and their range."""
    result = load(file)
    dense = result["rows"][0]["perplexity"]
    rows = [["dense", "", "", *(f"{value:.2f}" for value in dense.values())]]
    for recipe in dict.fromkeys(row["recipe"] for row in result["rows"][1:]):
        seeds = [row for row in result["rows"] if row["recipe"] == recipe]
        rises = []
        for name, before in dense.items():
            each = [100 * (row["perplexity"][name] / before - 1) for row in seeds]
            spread = f" ({min(each):.2f} to {max(each):.2f})" if len(each) > 1 else ""
            rises.append(f"{mean(each):+.2f}%{spread}")
        loads = [row["bytes_per_token"]["this pairing"] / 1e6 for row in seeds if row["bytes_per_token"]]
        loaded = f"{mean(loads):.2f}" if loads else ""
        rows.append([f"{recipe}, {len(seeds)}", f"{seeds[0]['expert_bytes'] / 1e6:.1f} MB", loaded, *rises])
    return table(["recipe, seeds", "expert bytes", "MB a token", *dense], rows)


def comparison() -> str:
    """Bits, bytes and perplexity of recipes and other methods on one text."""
    by_name = {row["name"]: row for row in load("compare-mixtral-30m-cpu.json")["rows"]}
    (text,) = by_name["dense"]["perplexity"]
    (dense,) = by_name["dense"]["perplexity"][text]
    rows = []
    for name in COMPARED:
        row = by_name[name]
        (value,) = row["perplexity"][text]
        score = f"{value:,.2f}" + (f" ({100 * (value / dense - 1):+,.2f}%)" if name != "dense" else "")
        rows.append([name, f"{row['bits_per_weight']:.2f}", f"{row['expert_bytes'] / 1e6:.1f}", score])
    return table(["recipe or method", "bits per weight", "expert MB", "perplexity"], rows)


def kernels(model: str) -> str:
    """Microseconds of one layer, each with bf16's time over it, and how much of a device copy's bandwidth the words of
    all active pairs were read at, for 16-bit and 8-bit ones."""
    ours = ("mask16", "angle8", "fp8 angle8", "trellis8", "trellis6", "trellis4")
    names = (*(f"puzzlemoe {name}" for name in ours), "vllm fp8", "vllm int4 marlin")
    rows = []
    again = model in ("Mixtral-8x7B", "Qwen3-30B-A3B")
    for point in points("kernels-two-models-h100.json" if again else "kernels-h100.json", model):
        times, floors = point["microseconds"], point["floors"]
        shares = ", ".join(f"{100 * floors[name] / times[name]:.0f}%" for name in names[:2])
        rows.append([*timed(point, names), shares])
    columns = ["vLLM bf16", "mask16", "angle8", "angle8, prefill in FP8", *ours[3:], "vLLM fp8", "vLLM int4"]
    return table([f"{model}, tokens", *columns, "mask16, angle8 of the floor"], rows)


def points(file: str, model: str) -> list[Any]:
    """A model's measurements with random routing."""
    return [each for each in load(file)["points"] if (each["model"], each["routing"]) == (model, "random")]


def timed(point: Any, names: Sequence[str]) -> list[str]:
    """Tokens, bf16's time, and that of contenders, each with bf16's over it."""
    times, bf16 = point["microseconds"], point["microseconds"]["vllm bf16"]
    cells = [f"{times[name]:.0f} ({bf16 / times[name]:.2f}x)" for name in names]
    return [str(point["tokens"]), f"{bf16:.0f}", *cells]


def kernels_among_others() -> str:
    """Microseconds that a layer adds to a decoder layer's other kernels."""
    names = ("puzzlemoe mask16", "puzzlemoe angle8", "puzzlemoe trellis4", "vllm fp8", "vllm int4 marlin")
    rows = [
        [model, *timed(point, names)]
        for model in ("Mixtral-8x7B", "Qwen3-30B-A3B")
        for point in points("kernels-among-others-h100.json", model)
    ]
    return table(["model", "tokens", "vLLM bf16", "mask16", "angle8", "trellis4", "vLLM fp8", "vLLM int4"], rows)


def kernels_few_tokens() -> str:
    """Microseconds of one layer of 16-bit words, back to back, and what it adds to a decoder layer's other kernels."""
    rows = []
    for model in ("Mixtral-8x7B", "Qwen3-30B-A3B"):
        files = ("kernels-few-tokens-h100.json", "kernels-few-tokens-among-others-h100.json")
        for alone, among in zip(*(points(file, model) for file in files), strict=True):
            rows.append([model, *timed(alone, ["puzzlemoe mask16"]), *timed(among, ["puzzlemoe mask16"])[1:]])
    columns = ["vLLM bf16", "mask16", "vLLM bf16, among others", "mask16, among others"]
    return table(["model", "tokens", *columns], rows)


def serving(model: str) -> str:
    """A whole model by kind of weights, with the ratio of bf16's decode step over each where bf16 fits the card."""
    results = load(f"serving-{model.lower()}-h100.json")
    base = next((result["rows"] for result in results if result["weights"] == "bf16"), None)
    rows = []
    for result in results:
        steps = [f"{row['decode_step_ms']:.1f} ms" for row in result["rows"]]
        if base and result["rows"] is not base:
            ratios = [b["decode_step_ms"] / r["decode_step_ms"] for b, r in zip(base, result["rows"], strict=True)]
            steps = [f"{step} ({ratio:.2f}x)" for step, ratio in zip(steps, ratios, strict=True)]
        memory = [f"{result['weight_bytes'] / 1e9:.1f} GB", f"{result['kv_cache_tokens']:,} tokens"]
        prefill = f"{result['rows'][-1]['prefill_tokens_per_second']:,.0f} tokens/s"
        rows.append([result["weights"], *memory, *steps, prefill])
    batches = [f"decode, batch {row['batch']}" for row in results[0]["rows"]]
    return table([model, "weights", "KV cache", *batches, "prefill"], rows)


def in_short() -> str:
    """Four kinds of weights of one whole model: memory, decode steps and prefill."""
    results = {result["weights"]: result for result in load("serving-qwen3-30b-a3b-h100.json")}
    rows = []
    for label, name in {"bf16": "bf16", "FP8": "fp8", "int4": "int4", "this project, default": "angle8"}.items():
        steps = {row["batch"]: row for row in results[name]["rows"]}
        decode = [f"{steps[batch]['decode_step_ms']:.1f} ms" for batch in (1, 32)]
        prefill = f"{steps[128]['prefill_tokens_per_second']:,.0f} tokens/s"
        rows.append([label, f"{results[name]['weight_bytes'] / 1e9:.1f} GB", *decode, prefill])
    columns = ["weights", "decode step, 1 request", "decode step, 32 requests", "prefill, 128 prompts"]
    return table(["Qwen3-30B-A3B", *columns], rows)


STAGES = ("calibrate", "pair", "merge", "write")

COMPRESSIONS = {
    "mixtral-8x7b-default": "Mixtral-8x7B, `default`",
    "mixtral-8x7b-angle8": "Mixtral-8x7B, `default` with `--no-compensate`",
    "mixtral-8x7b": "Mixtral-8x7B, `paper`",
    "qwen3-30b-a3b": "Qwen3-30B-A3B, `paper`",
}


def compression() -> str:
    """Seconds of a layer that is not the first, and memory."""
    rows = []
    for name, label in COMPRESSIONS.items():
        file = f"compression-{name}-h100.json"
        result = load(file)
        seconds = result["layer_seconds"][-1]
        cells = [f"{seconds[stage]:.2f}" for stage in ("calibrate", "pair", "merge", "write")]
        memory = f"{result['peak_device_bytes'] / 1e9:.1f} GB"
        rows.append([f"[{label}](../benchmarks/results/{file}), {result['calibration_tokens']:,}", *cells, memory])
    columns = ["calibration", "pairing", "merging and packing", "writing", "GPU memory at most"]
    return table(["layer, recipe, calibration tokens", *columns], rows)


WHOLE_COMMANDS = (
    ("Mixtral-8x7B", "H200", "mixtral-8x7b-h200"),
    ("Mixtral-8x7B", "2 x H200", "mixtral-8x7b-2-h200"),
    ("Mixtral-8x7B", "H100", "mixtral-8x7b-h100"),
    ("Qwen3-30B-A3B", "H200", "qwen3-30b-a3b-default-h200"),
    ("Qwen3-30B-A3B", "H100", "qwen3-30b-a3b-h100"),
    ("Mixtral-8x7B, earlier", "2 x H100", "mixtral-8x7b-2-h100"),
    ("Mixtral-8x7B's first four layers, `--bits 3`, earlier", "H200", "mixtral-8x7b-4-layers-trellis6-h200"),
    ("Qwen3-30B-A3B, before down projections were corrected", "H200", "qwen3-30b-a3b-h200"),
    ("Qwen3-30B-A3B, before down projections were corrected", "2 x H200", "qwen3-30b-a3b-2-h200"),
)
"""Models, machines and results of end_to_end.py."""


def whole_command() -> str:
    """What compressing a whole model takes."""
    rows = []
    for model, machine, file in WHOLE_COMMANDS:
        run = load(f"end-to-end-{file}.json")["compress"]
        before, after = (run["bytes"][f"experts_{when}"] + run["bytes"]["other"] for when in ("before", "after"))
        size, memory = f"{before / 1e9:.1f} -> {after / 1e9:.1f} GB", f"{run['peak_gpu_bytes'] / 1e9:.1f} GB"
        rows.append([model, machine, size, *_took(run), memory])
    columns = ["machine", "size", "whole command", "calibrate", "pair", "merge", "write", "GPU memory"]
    return table(["model", *columns], rows)


def _took(run: Any) -> list[str]:
    """The time of a whole command and of its stages."""
    minutes, seconds = divmod(round(run["seconds"]), 60)
    return [f"{minutes} min {seconds} s", *(f"{round(run['stages'][stage])} s" for stage in STAGES)]


def over_http() -> str:
    """Output tokens a second of a server, by its GPUs and the requests that are open at once."""
    served = load("whole-command-h200.json")["serve"]
    clients = served["output_tokens_per_second"][0]["by_clients"]
    rows = []
    for row in served["output_tokens_per_second"]:
        gpus = f"{row['gpus']}, tensor parallel" if row["tensor_parallel"] > 1 else str(row["gpus"])
        rows.append([gpus, *(f"{value:,}" for value in row["by_clients"].values())])
    return table([f"{served['model']}, GPUs", *(f"{count} at once" for count in clients)], rows)


SERVED = (
    ("Qwen3-30B-A3B", "qwen3-30b-a3b-served-h200"),
    ("Qwen3-30B-A3B", "qwen3-30b-a3b-served-rivals-h200"),
    ("Qwen3-30B-A3B", "qwen3-30b-a3b-served-2-h200"),
    ("Qwen3-30B-A3B", "qwen3-30b-a3b-served-4-h200"),
    ("Mixtral-8x7B", "mixtral-8x7b-served-2-h200"),
    ("Mixtral-8x7B", "mixtral-8x7b-served-4-h200"),
    ("Mixtral-8x7B", "mixtral-8x7b-served-h200"),
)
"""Models and results of end_to_end.py."""


def served() -> str:
    """Output tokens a second of a server, and milliseconds between those of an answer; tokens a second of prompts with
    answers of one token.  Rows of what failed are left out."""
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for model, file in SERVED:
        link = f"[{model}](../benchmarks/results/end-to-end-{file}.json)"
        for row in load(f"end-to-end-{file}.json")["serve"]:
            if "failed" in row:
                continue
            if row["answer_tokens"] > 1:
                column = f"{row['concurrency']} at once"
                figures = f"{row['output_throughput']:,.0f}, {row['mean_tpot_ms']:.1f} ms"
            else:
                column, figures = "prompts alone", f"{row['request_throughput'] * PROMPT:,.0f}"
            layout = _layout(row["tensor_parallel"], row["expert_parallel"])
            cells.setdefault((link, layout, row["weights"]), {})[column] = figures
    columns = [*(f"{count} at once" for count in (1, 32, 128)), "prompts alone"]
    lines = [[*name, *(own.get(column, "") for column in columns)] for name, own in cells.items()]
    return table(["run", "layout", "weights", *columns], lines)


def parallel() -> str:
    """How far a layout's outputs are from those of one GPU, for the packed weights and the same ones unpacked."""
    rows = []
    for file in sorted(RESULTS.glob("parallel-*.json")):
        result = load(file.name)
        found = {(row["layout"], row["weights"]): row for row in result["rows"] if "failed" not in row}
        label = f"[{result['model']}, {result['layers']} layers, `{result['code']}`](../benchmarks/results/{file.name})"
        for layout in dict.fromkeys(layout for layout, _ in found):
            cells = [cell for weights in ("packed", "unpacked") for cell in _apart(found.get((layout, weights)))]
            rows.append([label, _layout(int(layout[2:]), layout.startswith("ep")), *cells])
    columns = [
        f"{weights}, {what}" for weights in ("packed", "unpacked") for what in ("mean", "largest", "tokens alike")
    ]
    return table(["model", "layout", *columns], rows)


def _layout(gpus: int, expert_parallel: bool) -> str:
    """How a model is spread over GPUs, in words."""
    return f"{'expert' if expert_parallel else 'tensor'} parallel, {gpus} GPUs" if gpus > 1 else "1 GPU"


def _apart(row: Any) -> list[str]:
    """Mean and largest difference in nats, and how many generated tokens are alike."""
    if row is None:
        return ["failed"] * 3
    differences = [f"{row[f'{which}_difference']:.4f}" for which in ("mean", "largest")]
    return [*differences, f"{row['alike']} of {row['generated']}"]


CARDS = (16, 24, 48, 80, 141)
"""Memory of cards that models are to fit, GB of 10^9 bytes."""

ROOM = 0.9
"""Of a card's memory, what weights may take, so that the rest is left for the KV cache."""


def sizes() -> str:
    """GB of a packed model by `--bits` and `--dense`, with the smallest card that has room for it."""
    results = load("sizes.json")["bytes"]
    bits = sorted({row["bits"] for model in results.values() for row in model["packed"]}, key=float, reverse=True)
    rows = []
    for model, its in results.items():
        for dense in ("bf16", "fp8"):
            packed = {row["bits"]: row for row in its["packed"] if row["dense"] == dense}
            first = dense == "bf16"
            copied = f"{its['copied'] / 1e9:.1f}" if its["copied"] and first else ""
            cells = [_sized(its["bf16"]) if first else "", *(_sized(packed[each]) for each in bits), copied]
            rows.append([model if first else "", dense, *cells])
    columns = ["`--dense`", "in bf16", *(f"`--bits {each}`" for each in bits), "copied"]
    return table(["model", *columns], rows)


def _sized(weights: Any) -> str:
    """GB of weights, and the smallest card in brackets, if any has room."""
    total = (weights["experts"] + weights["other"]) / 1e9
    card = next((card for card in CARDS if total <= ROOM * card), None)
    return f"{total:.1f} ({card})" if card else f"{total:.1f}"


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": lambda: accuracy("accuracy-mixtral-30m-h100.json"),
    "partners": lambda: accuracy("partners-mixtral-30m-cpu.json"),
    "comparison": comparison,
    **{f"kernels {model}": partial(kernels, model) for model in LAYERS},
    "kernels among others": kernels_among_others,
    "kernels few tokens": kernels_few_tokens,
    "serving qwen3": lambda: serving("Qwen3-30B-A3B"),
    "serving mixtral": lambda: serving("Mixtral-8x7B"),
    "in short": in_short,
    "compression": compression,
    "parallel": parallel,
    "whole command": whole_command,
    "over http": over_http,
    "served": served,
    "sizes": sizes,
}


def filled(text: str) -> str:
    """A document with its tables as the results have them.  Raises KeyError for a table that is not made here."""
    between = re.compile(r"(<!-- table (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
    return between.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text()))
