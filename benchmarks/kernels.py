#!/usr/bin/env python3
"""One MoE layer on one GPU: this project's kernels against vLLM's, for the layers of named models.

    benchmarks/kernels.py --out results/kernels-h100.json              every model, token count and rival
    benchmarks/kernels.py --among-others --tokens 1 2 4 8 --out results/kernels-among-others-h100.json
    benchmarks/kernels.py --tune --out ../puzzlemoe_vllm/backends/cuda_dispatch.json   rewrite the dispatch table

Times are CUDA-graph replays over several copies of the layer, each with its own routing, that together exceed the L2
cache.  With --among-others a decoder layer's other kernels run between, and what they take alone is subtracted: back to
back, a layer's first kernel starts while the last layer's are still at work, which no model lets it.  The floor of
each of our codes is the time to read every distinct pair that the routing touches, at the bandwidth that a large device
copy reaches on the same machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional

from puzzlemoe_vllm.backends import Backend, ExpertWeights, cuda, triton
from puzzlemoe_vllm.backends.cuda_self_check import random_words
from puzzlemoe_vllm.format.codes import CODES, GROUP_SIZES, TableCode, get_code

WARM_SECONDS = 0.02
"""Of replays before those that are timed."""

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 448, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Model:
    experts: int
    topk: int
    hidden: int
    intermediate: int
    copies: int
    """Layers to rotate among, so that even one token's experts do not stay in the L2 cache.  In bf16 they fit into
    78 GiB."""

    def pair_bytes(self, code: str) -> float:
        """Of one pair's words and steps."""
        return 3 * self.hidden * self.intermediate * get_code(code).bits_per_pair(group_size(code)) / 8


def group_size(code: str) -> int | None:
    return GROUP_SIZES[0] if get_code(code).has_steps else None


MODELS = {
    "Mixtral-8x7B": Model(8, 2, 4096, 14336, 2),
    "Qwen3-30B-A3B": Model(128, 8, 2048, 768, 6),
    "DeepSeek-MoE-16B": Model(64, 6, 2048, 1408, 4),
    "Qwen1.5-MoE": Model(60, 4, 2048, 1408, 4),
    "GLM-4.5-Air": Model(128, 8, 4096, 1408, 2),
    "Qwen3-Next-80B-A3B": Model(512, 10, 2048, 512, 8),
    "DeepSeek-V3": Model(256, 8, 7168, 2048, 2),
    "MiniMax-M2": Model(256, 8, 3072, 1536, 3),
}


def routing(model: Model, tokens: int, skew: float, generator: torch.Generator) -> Tensor:
    """int32 [tokens, topk]; experts drawn without replacement with odds rank^-skew, ranks shuffled."""
    odds = torch.arange(1, model.experts + 1, device="cuda", dtype=torch.float32) ** -skew
    odds = odds[torch.randperm(model.experts, device="cuda", generator=generator)]
    noise = torch.rand(tokens, model.experts, device="cuda", generator=generator)
    return (noise.log() / odds).topk(model.topk).indices.to(torch.int32)


def graph_microseconds(calls: list[Callable[[], object]]) -> float:
    """Median time of one call, from replays of a graph of all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    # A device that has been idle takes a while to raise its clocks: without this, what is timed first comes out slow.
    began = perf_counter()
    while perf_counter() - began < WARM_SECONDS:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    while len(times) < 5 or (sum(times) < 40 and len(times) < 30):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) * 1e3 / len(calls)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy on the device: by the driver or by a kernel, the faster."""
    source = torch.ones(1 << 28, dtype=torch.int64, device="cuda")
    target = torch.empty_like(source)
    ways = [lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target)]
    return 2 * source.nbytes / (min(graph_microseconds([way] * 3) for way in ways) * 1e-6)


def copies(layers: list, tokens: int) -> list:
    """The layers to rotate among: one is enough once every expert is touched and a layer exceeds the cache."""
    return layers if tokens < 512 else layers[:1]


AMONG_OTHERS_BYTES = 32e9
"""Of the layers in bf16 that are timed with other kernels between: of few, the difference of two times is noise."""


def layer_count(model: Model, between: bool) -> int:
    """Layers to time in turn; between: other kernels run between them."""
    bf16_bytes = 2 * 3 * model.experts * model.hidden * model.intermediate
    return max(model.copies, int(AMONG_OTHERS_BYTES / bf16_bytes)) if between else model.copies


def among_others(model: Model, calls: list[Callable[[], object]], x: Tensor) -> float:
    """Median time that a call adds to a decoder layer's other kernels, in about: norms, attention's projections and the
    router, which chooses experts last."""

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * columns**-0.5

    hidden, norm = model.hidden, torch.ones(model.hidden, device="cuda", dtype=torch.bfloat16)
    shapes = ((5 * hidden // 2, hidden), (hidden, 2 * hidden), (model.experts, hidden))
    layers = [tuple(matrix(*shape) for shape in shapes) for _ in calls]

    def others(into: Tensor, out_of: Tensor, router: Tensor) -> object:
        heads = functional.linear(functional.rms_norm(x, (hidden,), norm), into)[:, : 2 * hidden]
        after = functional.rms_norm(x + functional.linear(heads, out_of), (hidden,), norm)
        return functional.linear(after, router).float().softmax(-1).topk(model.topk)

    def whole(weights: tuple[Tensor, ...], call: Callable[[], object]) -> None:
        others(*weights)
        call()

    together = graph_microseconds([partial(whole, *each) for each in zip(layers, calls, strict=True)])
    return together - graph_microseconds([partial(others, *weights) for weights in layers])


Call = Callable[[Tensor, Tensor, Tensor], object]


def pair_weights(model: Model, code: str) -> ExpertWeights:
    pairs, hidden, intermediate = model.experts // 2, model.hidden, model.intermediate
    draw = torch.Generator("cuda").manual_seed(0)
    words, steps = [], []
    for rows, columns in ((2 * intermediate, hidden), (hidden, intermediate)):
        one_by_one = (random_words(get_code(code), 1, rows, columns, draw) for _ in range(pairs))
        words.append(torch.cat(list(one_by_one)))
        size = group_size(code)
        groups = (pairs, rows, columns // size) if size else None
        steps.append(torch.full(groups, columns**-0.5, dtype=torch.bfloat16, device="cuda") if groups else None)
    dense = torch.empty(0, 2 * intermediate, hidden, dtype=torch.bfloat16, device="cuda")
    return ExpertWeights(*words, dense, dense.new_empty(0, hidden, intermediate), None, code, *steps)


def ours(model: Model, backend: Backend, code: str) -> Call:
    weights = pair_weights(model, code)
    backend.prepare(weights)
    return lambda x, topk_weights, topk_ids: backend.fused_experts(x, topk_weights, topk_ids, weights)


def ours_fp8(model: Model, code: str) -> Call:
    """Many tokens in e4m3, few as ever."""
    weights = pair_weights(model, code)
    cuda.prepare(weights)

    def call(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        load = topk_ids.numel() / model.experts
        kernel = cuda.choose_kernel(load, int(capability()), get_code(code), fp8=True)
        return cuda.fused_experts(x, topk_weights, topk_ids, weights, kernel=kernel)

    return call


def capability() -> str:
    """Of the GPU, without its dot, as the dispatch table has it."""
    return "".join(map(str, torch.cuda.get_device_capability()))


def random_matrices(model: Model) -> tuple[Tensor, Tensor]:
    shapes = (
        (model.experts, 2 * model.intermediate, model.hidden),
        (model.experts, model.hidden, model.intermediate),
    )
    return tuple(torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02) for shape in shapes)


def vllm_bf16(model: Model) -> Call:
    from vllm.model_executor.layers.fused_moe import fused_experts

    w13, w2 = random_matrices(model)
    return lambda x, topk_weights, topk_ids: fused_experts(x, w13, w2, topk_weights, topk_ids)


def vllm_fp8(model: Model) -> Call:
    from vllm.model_executor.layers.fused_moe import fused_experts
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

    scale = torch.ones(model.experts, device="cuda")
    config = fp8_w8a8_moe_quant_config(w1_scale=scale, w2_scale=scale)
    w13, w2 = (matrix.to(torch.float8_e4m3fn) for matrix in random_matrices(model))
    return lambda x, topk_weights, topk_ids: fused_experts(x, w13, w2, topk_weights, topk_ids, quant_config=config)


def vllm_int4(model: Model) -> Call:
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.scalar_type import scalar_types

    def packed(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        bits = torch.randint(-(1 << 31), 1 << 31, (model.experts, columns // 16, rows * 2), device="cuda")
        scales = torch.full((model.experts, columns // 128, rows), 0.01, device="cuda", dtype=torch.bfloat16)
        return bits.to(torch.int32), scales

    w13, scales13 = packed(2 * model.intermediate, model.hidden)
    w2, scales2 = packed(model.hidden, model.intermediate)
    return lambda x, topk_weights, topk_ids: fused_marlin_moe(
        x, w13, w2, None, None, scales13, scales2, topk_weights, topk_ids, quant_type_id=scalar_types.uint4b8.id
    )


OURS = {f"puzzlemoe {code}": (cuda, code) for code in CODES} | {
    f"puzzlemoe triton {code}": (triton, code) for code in CODES
}
FP8 = {f"puzzlemoe fp8 {name}": name for name, code in CODES.items() if isinstance(code, TableCode) and code.sums}
CODE_OF = {name: code for name, (_, code) in OURS.items()} | FP8
CONTENDERS: dict[str, Callable[[Model], Call]] = {
    **{name: partial(ours, backend=backend, code=code) for name, (backend, code) in OURS.items()},
    **{name: partial(ours_fp8, code=code) for name, code in FP8.items()},
    "vllm bf16": vllm_bf16,
    "vllm fp8": vllm_fp8,
    "vllm int4 marlin": vllm_int4,
}
DEFAULT = [
    "puzzlemoe mask16",
    "puzzlemoe angle8",
    "puzzlemoe fp8 angle8",
    "puzzlemoe triton mask16",
    "vllm bf16",
    "vllm fp8",
    "vllm int4 marlin",
]


def machine() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "python": platform.python_version()}
    if "vllm" in sys.modules:
        versions["vllm"] = sys.modules["vllm"].__version__
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    return {"device": torch.cuda.get_device_name(), "driver": driver, **versions}


@dataclass
class Point:
    model: str
    routing: str
    tokens: int
    experts: float
    """Distinct experts that a layer's routing touches, mean over the copies; pairs likewise."""
    pairs: float
    floors: dict[str, float]
    """Microseconds by contender; rivals have none."""
    microseconds: dict[str, float]


def measure(
    name: str, contenders: list[str], tokens: list[int], skews: list[float], bandwidth: float, between: bool
) -> Iterator[list[Point]]:
    """Every point of one model, after each contender with those so far; one contender in memory at a time.

    between: other kernels run between layers.
    """
    model = MODELS[name]
    points: dict[tuple[float, int], Point] = {}
    for contender in contenders:
        try:
            layers = [CONTENDERS[contender](model) for _ in range(layer_count(model, between))]
            generator = torch.Generator("cuda").manual_seed(0)
            for skew in skews:
                for count in tokens:
                    ids = [routing(model, count, skew, generator) for _ in copies(layers, count)]
                    x = torch.randn(count, model.hidden, device="cuda", dtype=torch.bfloat16, generator=generator)
                    weights = torch.rand(count, model.topk, device="cuda", generator=generator)
                    calls = [partial(layer, x, weights, chosen) for layer, chosen in zip(layers, ids, strict=False)]
                    time = among_others(model, calls, x) if between else graph_microseconds(calls)
                    pairs = statistics.mean((chosen // 2).unique().numel() for chosen in ids)
                    experts = statistics.mean(chosen.unique().numel() for chosen in ids)
                    kind = f"skew {skew:g}" if skew else "random"
                    point = points.setdefault((skew, count), Point(name, kind, count, experts, pairs, {}, {}))
                    point.microseconds[contender] = time
                    if contender in CODE_OF:
                        point.floors[contender] = pairs * model.pair_bytes(CODE_OF[contender]) / bandwidth * 1e6
        except Exception as reason:  # a rival may lack a kernel for this GPU: its column stays empty, and says why
            print(
                f"{name}: {contender} was not measured: {type(reason).__name__}: {str(reason)[:300]}", file=sys.stderr
            )
        layers = None
        torch.cuda.empty_cache()
        yield list(points.values())


def show(point: Point, contenders: list[str]) -> str:
    """A line of times, each with bf16's time over it, and for our own the floor's share of it."""
    base = point.microseconds.get("vllm bf16")
    cells = [f"{point.tokens:6d} {point.experts:6.1f} {point.pairs:5.1f}"]
    for contender in contenders:
        time = point.microseconds.get(contender)
        ratio = f"{base / time:5.2f}x" if time and base else ""
        share = f"{point.floors[contender] / time * 100:4.0f}%" if time and contender in point.floors else ""
        cells.append(f"{time:9.1f} {ratio:6s} {share:5s}" if time else " " * 22)
    return " ".join(cells)


Losses = dict[float, dict[str, list[float]]]
"""By slots per expert and kernel, each model's times over its best."""


STAND_FOR_THEIR_KIND = ("mask16", "angle8", "trellis6")
"""A code for each row of the dispatch table."""


def candidates(code: str, names: list[str] | None, fp8: bool = False) -> list[str]:
    """The kernels that this GPU can run on words of a code; of those with names, if they are given."""
    runnable = cuda.runnable_kernels(torch.device("cuda"), get_code(code), fp8)
    return [kernel for kernel in runnable if names is None or kernel in names]


def time_kernels(models: list[str], tokens: list[int], kernels: list[str], code: str) -> Losses:
    """Kernels that are far behind with some tokens are not timed with more."""
    losses: Losses = {}
    for name in models:
        model = MODELS[name]
        prepared = [pair_weights(model, code) for _ in range(model.copies)]
        for weights in prepared:
            cuda.prepare(weights)
        fast = kernels
        generator = torch.Generator("cuda").manual_seed(0)
        for count in tokens:
            ids = [routing(model, count, 0.0, generator) for _ in copies(prepared, count)]
            x = torch.randn(count, model.hidden, device="cuda", dtype=torch.bfloat16)
            topk_weights = torch.rand(count, model.topk, device="cuda")
            times = {}
            for kernel in fast:
                calls = [
                    partial(cuda.fused_experts, x, topk_weights, chosen, weights, kernel=kernel)
                    for weights, chosen in zip(prepared, ids, strict=False)
                ]
                times[kernel] = graph_microseconds(calls)
            fast = [kernel for kernel in fast if times[kernel] < 2 * min(times.values())]
            best, load = min(times.values()), count * model.topk / model.experts
            print(f"{code} {name:18s} {count:6d} tokens, {load:8.2f} slots per expert: "
                  + "  ".join(f"{kernel} {time:.1f}" for kernel, time in times.items()))  # fmt: skip
            for kernel, time in times.items():
                losses.setdefault(load, {}).setdefault(kernel, []).append(time / best)
        prepared = None
        torch.cuda.empty_cache()
    return losses


def rows_of(losses: Losses) -> list[dict]:
    """For each load, the kernel with the least time summed over the models."""
    rows: list[dict] = []
    for load in sorted(losses):
        mean = {kernel: statistics.mean(ratios) for kernel, ratios in losses[load].items()}
        # Differences below 2% are noise: stay with the last row's kernel.
        if rows and mean.get(rows[-1]["kernel"], 2.0) < 1.02 * min(mean.values()):
            rows[-1]["slots_per_expert"] = load
        else:
            rows.append({"slots_per_expert": load, "kernel": min(mean, key=lambda kernel: mean[kernel])})
    return rows


def fp8_row(losses: Losses, kernel: str) -> dict:
    """From which load on products in e4m3 are the fastest, at it and at all that were timed above it."""
    above = 0.0
    for load in losses:
        others = min(statistics.mean(ratios) for name, ratios in losses[load].items() if name != kernel)
        if statistics.mean(losses[load].get(kernel, [2.0])) >= others:
            above = max(above, load)
    return {"above_slots_per_expert": above, "kernel": kernel}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--contenders", nargs="+", default=DEFAULT, choices=CONTENDERS)
    parser.add_argument("--skews", nargs="+", type=float, default=[0.0, 0.5], help="0 is uniform routing")
    parser.add_argument("--among-others", action="store_true", help="a decoder layer's other kernels run between")
    parser.add_argument("--tune", action="store_true", help="time every kernel and write the dispatch table")
    parser.add_argument("--kernels", nargs="+", help="of the CUDA library, for --tune; default all that run here")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    if arguments.tune:
        if unknown := set(arguments.kernels or ()) - set(cuda.kernel_names()):
            parser.error(f"the library has no kernel {', '.join(sorted(unknown))}")
        kernels = {code: candidates(code, arguments.kernels) for code in STAND_FOR_THEIR_KIND}
        if none := [code for code, names in kernels.items() if not names]:
            parser.error(f"no kernel of --kernels multiplies words of {', '.join(none)} on this GPU")
        table = json.loads(cuda.DISPATCH.read_text())
        table["kernels"][capability()] = {
            cuda.kind_of(get_code(code)): rows_of(time_kernels(arguments.models, arguments.tokens, names, code))
            for code, names in kernels.items()
        }
        for kernel in candidates("angle8", None, fp8=True):
            many = [tokens for tokens in arguments.tokens if tokens >= 512]  # few would leave it too far behind
            losses = time_kernels(arguments.models, many, [kernel, *kernels["angle8"]], "angle8")
            table["fp8_prefill"][capability()] = fp8_row(losses, kernel)
        table.setdefault("measured", {})[capability()] = machine()
        text = json.dumps(table, indent=2) + "\n"
    else:
        bandwidth = copy_bandwidth()
        print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
        done: list[Point] = []
        for name in arguments.models:
            print(f"{name}\ntokens experts pairs " + " ".join(f"{c:>22s}" for c in arguments.contenders))
            points: list[Point] = []
            measuring = (arguments.contenders, arguments.tokens, arguments.skews, bandwidth, arguments.among_others)
            for points in measure(name, *measuring):
                measured = [asdict(point) for point in (*done, *points)]
                result = {"machine": machine(), "copy_bandwidth": bandwidth, "points": measured}
                text = json.dumps(result, indent=1) + "\n"
                if arguments.out:  # after every contender, so that an interrupted run keeps what it has
                    arguments.out.write_text(text)
            done += points
            for point in points:
                print(show(point, arguments.contenders) + f" {point.routing}", flush=True)
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
