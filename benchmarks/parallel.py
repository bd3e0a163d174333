"""Are a packed model's outputs under tensor and expert parallelism as near to those on one GPU as the unpacked
model's own are?

    puzzlemoe unpack PACKED UNPACKED
    python benchmarks/parallel.py PACKED UNPACKED --output parallel.json

Each of the two folders is loaded in each layout, with a process of its own (benchmarks/generate.py), as many at once as
there are GPUs for, and compared with its own run on one GPU: by how much the log-probabilities of 16 prompts' random
tokens differ, and how many of the 16 tokens after each of them are alike.

Ranks add up parts of a sum in another order than one GPU does, so no model's outputs are the same in two layouts.  How
far apart they come depends on the model: with random weights, log-probabilities of tokens and of experts are nearly
tied, a last bit sends a token to another expert, and greedy decoding goes elsewhere from there.  So no figure of the
packed model says anything by itself; the unpacked one's, of the same weights in the same layout, is its yardstick.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_groups import Work, environment_of, lacking_room, side_by_side, visible_gpus
from serving import driver, why_failed

GENERATE = Path(__file__).with_name("generate.py")


class Layout(NamedTuple):
    """How a model is spread over GPUs."""

    gpus: int
    expert_parallel: bool = False


ONE_GPU = "tp1"
LAYOUTS = {
    ONE_GPU: Layout(1),
    "tp2": Layout(2),
    "ep2": Layout(2, expert_parallel=True),
    "tp4": Layout(4),
    "ep4": Layout(4, expert_parallel=True),
}
"""tp: every expert is cut; ep: every rank has its share of whole experts."""

Runs = Mapping[tuple[str, str], dict[str, Any]]
"""What generate.py wrote, or {"failed": why}, by weights ("packed" or "unpacked") and layout."""


def comparisons(runs: Runs) -> list[dict[str, Any]]:
    """A row for each run whose weights' run on one GPU is there, other than those: mean and largest absolute difference
    of the log-probabilities in nats, and how many of the generated tokens are alike.  Runs that failed are rows that
    say why."""
    rows = []
    for (weights, layout), run in runs.items():
        about = {"weights": weights, "layout": layout}
        if "failed" in run:
            rows.append(about | run)
        elif layout != ONE_GPU and "prompt_logprobs" in (one := runs.get((weights, ONE_GPU), {})):
            rows.append(about | difference(one, run))
    return rows


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """How far apart two runs on the same prompts are.  Raises ValueError when they have not as many values."""
    pairs = _pairs(one["prompt_logprobs"], other["prompt_logprobs"])
    apart = [abs(here - there) for here, there in pairs]
    tokens = _pairs(one["tokens"], other["tokens"])
    return {
        "mean_difference": sum(apart) / len(apart),
        "largest_difference": max(apart),
        "prompt_tokens": len(apart),
        "alike": sum(here == there for here, there in tokens),
        "generated": len(tokens),
    }


def _pairs(ones: list[list[Any]], others: list[list[Any]]) -> list[tuple[Any, Any]]:
    """The values of two lists of lists that stand at the same place."""
    lists = zip(ones, others, strict=True)
    return [pair for one, other in lists for pair in zip(one, other, strict=True)]


def generated(folder: Path, layout: Layout, gpu_memory: float, gpus: list[str]) -> dict[str, Any]:
    """What generate.py writes, or why it failed; standard error then gets all that it said."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "generated.json")
        command = [sys.executable, str(GENERATE), str(folder), "--output", str(output)]
        command += ["--tensor-parallel", str(layout.gpus), "--gpu-memory", str(gpu_memory)]
        command += ["--expert-parallel"] if layout.expert_parallel else []
        done = subprocess.run(
            command,
            env=environment_of(gpus),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            print(done.stdout, end="", file=sys.stderr, flush=True)
            return {"failed": f"generate.py ended with status {done.returncode}: {why_failed(done.stdout)}"}
        said: dict[str, Any] = json.loads(output.read_text())
        return said


def chosen(layouts: list[str] | None, gpus: int) -> list[str]:
    """The layouts to run, one GPU first.  Exits when there are too few GPUs."""
    names = layouts or [name for name in LAYOUTS if LAYOUTS[name].gpus <= gpus]
    names = [ONE_GPU, *(name for name in names if name != ONE_GPU)]
    if lacking := [name for name in names if LAYOUTS[name].gpus > gpus]:
        sys.exit(f"{', '.join(lacking)}: more GPUs are needed than the {gpus} that CUDA sees")
    if names == [ONE_GPU]:
        sys.exit("there is nothing to compare one GPU with: give a --layout, on a machine that has GPUs for it")
    return names


def measured(folders: Mapping[str, Path], layouts: list[str], gpu_memory: float, gpus: list[str]) -> Iterator[Runs]:
    """The runs so far, layout after layout, whenever one has ended."""
    names = [(weights, layout) for layout in layouts for weights in folders]
    work = [
        Work(LAYOUTS[layout].gpus, partial(generated, folders[weights], LAYOUTS[layout], gpu_memory))
        for weights, layout in names
    ]
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    for position, run in side_by_side(work, gpus):
        runs[names[position]] = run
        yield {name: runs[name] for name in names if name in runs}


def packed_config(packed: Path, unpacked: Path) -> dict[str, Any]:
    """config.json of the packed model.  Exits when a folder is not of its kind."""
    configs = []
    for folder, wanted in ((packed, True), (unpacked, False)):
        if not (folder / "config.json").exists():
            sys.exit(f"{folder}: there is no config.json, so it is no model")
        configs.append(json.loads((folder / "config.json").read_text()))
        is_packed = configs[-1].get("quantization_config", {}).get("quant_method") == "puzzlemoe"
        if is_packed != wanted:
            sys.exit(f"{folder} is {'a' if is_packed else 'no'} packed model: give the packed folder, then the other")
    return dict(configs[0])


def machine_and_model(config: dict[str, Any], gpus: list[str]) -> dict[str, Any]:
    """What was measured, and where."""
    return {
        "model": config["model_type"],
        "layers": config.get("text_config", config)["num_hidden_layers"],
        "code": config["quantization_config"].get("code"),
        "device": torch.cuda.get_device_name(),
        "devices": len(gpus),
        "driver": driver(),
    }


def main() -> None:
    """Prints a JSON line per comparison as it comes, and writes all with --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path)
    parser.add_argument("unpacked", type=Path)
    parser.add_argument(
        "--layout", choices=LAYOUTS, nargs="+", help="default those that there are GPUs for; one GPU is always run"
    )
    parser.add_argument("--gpu-memory", type=float, default=0.9, help="vLLM's gpu_memory_utilization")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    gpus = visible_gpus()
    layouts = chosen(arguments.layout, len(gpus))
    folders = {"packed": arguments.packed, "unpacked": arguments.unpacked}
    result = machine_and_model(packed_config(**folders), gpus)
    for folder in folders.values():
        if reason := lacking_room(folder, 1):
            sys.exit(f"{folder}, on the one GPU that every layout is compared with: {reason}")
    printed: list[dict[str, Any]] = []
    for runs in measured(folders, layouts, arguments.gpu_memory, gpus):
        rows = comparisons(runs)
        for row in (row for row in rows if row not in printed):
            print(json.dumps(row), flush=True)
            printed.append(row)
        result |= {key: run[key] for run in runs.values() for key in ("vllm", "torch") if key in run} | {"rows": rows}
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    if failed := [" ".join(name) for name, run in runs.items() if "failed" in run]:
        sys.exit(f"failed, and so is not compared: {', '.join(failed)}")


if __name__ == "__main__":
    main()
