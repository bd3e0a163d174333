"""A model of full size from its checkpoint to its server: written with random weights, compressed, and served beside
its rivals, on one machine in one run.

    python benchmarks/end_to_end.py --model qwen3-30b-a3b --output results.json
    python benchmarks/end_to_end.py --model mixtral-8x7b --only write --only compress --packed /scratch/packed
    python benchmarks/end_to_end.py --only serve --tensor-parallel 2 4 --expert-parallel --weights packed --weights fp8

The source lies in memory by default: 61 GB for Qwen3-30B-A3B, 93 GB for Mixtral-8x7B, and the packed model beside it.
Calibration is 128 windows of 2048 tokens of the tiny example's text, by its tokenizer, over and over: time does not
depend on what a text says.  Servers take experts at random, uniformly, as benchmarks/serving.py does and says why; the
int4 rival has no checkpoint, but whatever vLLM's dummy weights are.  As many servers are measured side by side as the
machine has GPUs for: each has its own, and shares the CPUs.  With --start-together, servers that are measured one after
another are started at once, and those that wait hold memory on the GPUs of the one that is measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_groups import environment_of, lacking_room, visible_gpus
from safetensors.torch import save_file
from serving import ANSWER, MODELS, PROMPT, Clients, MeasurementError, config_of, driver, why_failed

from puzzlemoe_offline.run.output import to_host
from puzzlemoe_vllm.backends import FP8_VARIABLE

VLLM = (sys.executable, "-P", "-m", "vllm.entrypoints.cli.main")
"""This Python's `vllm`, wherever the command may be.  -P: as the command, it imports nothing from where it is run."""

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny-moe"
PARTS = ("write", "compress", "serve")
PREFILL_FP8 = "packed, prefill in FP8"
WEIGHTS = ("packed", PREFILL_FP8, "bf16", "fp8", "int4")
"""What is served: the packed model in two ways, and its rivals."""
WRITERS = 6
"""Threads that write files, and files that wait for one."""
PREFILL_CLIENTS, PREFILL_PROMPTS = 32, 256
"""Of a measurement of prefill alone, whose answers are one token long."""
SHARE = 0.05
"""Of a GPU, what must be free when one of several servers is started on it."""
START_LIMIT = 600
"""Seconds that a server may take to answer: one that hangs would hold up those that are started with it."""
WINDOWS, WINDOW = 128, 2048
CHARACTERS = 4
"""Of text for each token that is asked for: the tokenizer makes one of 3.8 on average."""


def write_checkpoint(name: str, folder: Path, layers: int | None) -> int:
    """A checkpoint with random bf16 weights, a file a layer; returns its bytes.  layers: None for all."""
    config = MODELS[name] | ({"num_hidden_layers": layers} if layers else {})
    folder.mkdir(parents=True, exist_ok=True)
    for file in (EXAMPLE / "model").glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    written, waiting = 0, list[Future[None]]()
    with ThreadPoolExecutor(WRITERS) as pool:
        for file, tensors in files_of(config):
            weight_map |= dict.fromkeys(tensors, file)
            written += sum(tensor.nbytes for tensor in tensors.values())
            waiting.append(pool.submit(save_file, to_host(tensors), folder / file, {"format": "pt"}))
            if len(waiting) > WRITERS:
                waiting.pop(0).result()
        for each in waiting:
            each.result()
    index = {"metadata": {"total_size": written}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return written


def files_of(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Names and tensors of the files of a model."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    outside = {"model.embed_tokens.weight": drawn(vocabulary, hidden), "model.norm.weight": ones(hidden)}
    yield "outside.safetensors", outside | {"lm_head.weight": drawn(vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        yield f"layer-{layer:03}.safetensors", layer_tensors(config, f"model.layers.{layer}")


def layer_tensors(config: dict[str, Any], layer: str) -> dict[str, torch.Tensor]:
    """One decoder layer's tensors."""
    mixtral = config["model_type"] == "mixtral"
    block, names = (
        ("block_sparse_moe", ("w1", "w3", "w2")) if mixtral else ("mlp", ("gate_proj", "up_proj", "down_proj"))
    )
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = head_size(config)
    inner = config.get("moe_intermediate_size", config["intermediate_size"])
    experts = config.get("num_local_experts") or config["num_experts"]
    tensors = {f"{layer}.{block}.gate.weight": drawn(experts, hidden)}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{layer}.{norm}.weight"] = ones(hidden)
    for projection, count in (("q", heads), ("k", config["num_key_value_heads"]), ("v", config["num_key_value_heads"])):
        tensors[f"{layer}.self_attn.{projection}_proj.weight"] = drawn(count * head, hidden)
    tensors[f"{layer}.self_attn.o_proj.weight"] = drawn(hidden, heads * head)
    if not mixtral:
        tensors |= {f"{layer}.self_attn.{norm}.weight": ones(head) for norm in ("q_norm", "k_norm")}
    for expert in range(experts):
        for projection, shape in zip(names, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True):
            tensors[f"{layer}.{block}.experts.{expert}.{projection}.weight"] = drawn(*shape)
    return tensors


def head_size(config: dict[str, Any]) -> int:
    """Columns of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def drawn(rows: int, columns: int) -> torch.Tensor:
    """bf16 [rows, columns] on the GPU."""
    return torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda").normal_(std=columns**-0.5)


def ones(size: int) -> torch.Tensor:
    """What a norm's weights begin as."""
    return torch.ones(size, dtype=torch.bfloat16)


def compress(source: Path, packed: Path, options: list[str]) -> dict[str, Any]:
    """On how many GPUs; seconds of the whole command, of its stages and, with one GPU, the rest (Python's own start and
    end), and of the median layer's stages; the most memory of all GPUs that was in use; bytes before and after."""
    text = (EXAMPLE / "calibration.txt").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        calibration = Path(scratch, "text.txt")
        calibration.write_text(text * (WINDOWS * WINDOW * CHARACTERS // len(text) + 1), encoding="utf-8")
        command = [sys.executable, "-m", "puzzlemoe_offline", "compress", source, packed, "--calibration", calibration]
        command += ["--samples", WINDOWS, "--sequence-length", WINDOW, *options]
        began, peak = time.perf_counter(), 0
        process = subprocess.Popen([str(word) for word in command])
        while not ended(process, 2):  # the driver's answer holds up the work that is asked about
            peak = max(peak, gpu_bytes())
        seconds = time.perf_counter() - began
        if process.returncode:
            sys.exit(f"compressing failed with status {process.returncode}")
    report = json.loads((packed / "puzzlemoe_report.json").read_text())
    if (tokens := report["calibration"]["tokens"]) != WINDOWS * WINDOW:
        sys.exit(f"the text gave {tokens} tokens, not {WINDOWS * WINDOW}: its windows are too few to be timed")
    layers = [layer["seconds"] for layer in report["layers"]]
    alone = report["devices"] == 1  # stages of several overlap
    return {
        "devices": report["devices"],
        "seconds": seconds,
        "stages": report["seconds"],
        "rest": seconds - sum(report["seconds"].values()) if alone else None,
        "median_layer": {stage: statistics.median(its[stage] for its in layers) for stage in layers[0]},
        "peak_gpu_bytes": peak,
        "bytes": report["bytes"],
    }


def ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process ends within that time."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def gpu_bytes() -> int:
    """Memory in use, as the driver says, of all GPUs, or of those that CUDA is to see."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    query.append(f"--id={','.join(visible_gpus())}")
    used = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    return sum(map(int, used)) << 20


class Server(NamedTuple):
    """What is served, and on which GPUs and port."""

    weights: str
    gpus: list[str]
    expert_parallel: bool
    port: int

    @property
    def about(self) -> dict[str, Any]:
        """What every row of it says."""
        return {
            "weights": self.weights,
            "tensor_parallel": len(self.gpus),
            "expert_parallel": self.expert_parallel,
        }


class Started(NamedTuple):
    """A server that answers, its clients, and what ends them all."""

    server: Server
    seconds: float
    clients: Clients
    ending: ExitStack

    def measured(self, concurrencies: list[int]) -> Iterator[dict[str, Any]]:
        """A row for each number of clients and one for prefill alone.  Raises MeasurementError."""
        url = f"http://127.0.0.1:{self.server.port}"
        for clients in concurrencies:
            yield self.clients.measure(url, clients, max(8, 4 * clients))
        # After all that compiles kernels or loads them.
        yield self.clients.measure(url, PREFILL_CLIENTS, PREFILL_PROMPTS, answer=1)


def rounds_of(arguments: argparse.Namespace, gpus: list[str]) -> list[list[Server]]:
    """The servers, in rounds of those that have GPUs apart from each other."""
    rounds: list[list[Server]] = []
    free: list[str] = []
    ports = iter(range(arguments.port, 1 << 16))
    for count in arguments.tensor_parallel:
        for expert_parallel in (False, True) if arguments.expert_parallel and count > 1 else (False,):
            for weights in arguments.weights:
                if len(free) < count:
                    rounds.append([])
                    free = gpus
                taken, free = free[:count], free[count:]
                rounds[-1].append(Server(weights, taken, expert_parallel, next(ports)))
    return rounds


def serve_all(arguments: argparse.Namespace, rounds: list[list[Server]]) -> Iterator[list[dict[str, Any]]]:
    """The rows so far, in the order of the servers, after every round."""
    rows: list[dict[str, Any]] = []
    for group in [rounds] if arguments.start_together else [[each] for each in rounds]:
        for measured in serve_group(arguments, group):
            rows = rows + measured
            yield rows


def serve_group(arguments: argparse.Namespace, rounds: list[list[Server]]) -> Iterator[list[dict[str, Any]]]:
    """Each round's rows; all servers are started before the first is measured, and ended after the last."""
    servers = [server for each in rounds for server in each]
    with ThreadPoolExecutor(len(servers)) as pool:
        starting = {server.port: pool.submit(start, server, arguments) for server in servers}
        try:
            wait(starting.values())
            for each in rounds:
                measured = pool.map(lambda server: rows_of(server, starting[server.port], arguments.clients), each)
                yield [row for rows in measured for row in rows]
        finally:
            list(pool.map(end, starting.values()))


def rows_of(server: Server, starting: Future[Started], concurrencies: list[int]) -> list[dict[str, Any]]:
    """What a server's clients measure, by their number and of prefill; the last row says why there are no more, if it
    did not start or a measurement failed."""
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(server.about | row)
        print(json.dumps(rows[-1]) + "\n", end="", flush=True)  # in one piece: others print meanwhile

    try:
        started = starting.result()
        for row in started.measured(concurrencies):
            add({"start_seconds": started.seconds} | row)
    except MeasurementError as error:
        add({"failed": str(error)})
    return rows


def end(starting: Future[Started]) -> None:
    """Ends a server that was started."""
    wait([starting])
    if not starting.exception():
        starting.result().ending.close()


def start(server: Server, arguments: argparse.Namespace) -> Started:
    """Starts a server.  Raises MeasurementError when it does not fit or ends before it answers."""
    weights, gpus = server.weights, server.gpus
    folder = arguments.packed if weights in ("packed", PREFILL_FP8) else arguments.source
    if weights == "bf16" and (reason := lacking_room(folder, len(gpus))):
        raise MeasurementError(reason)
    config = json.loads((folder / "config.json").read_text())
    at_most = max(*arguments.clients, PREFILL_CLIENTS)  # CUDA graphs for more would take time and serve nobody
    options = ["--max-model-len", "2048", "--no-enable-prefix-caching", "--port", str(server.port)]
    options += ["--tensor-parallel-size", str(len(gpus)), "--max-num-seqs", str(at_most)]
    options += ["--enable-expert-parallel"] if server.expert_parallel else []
    options += ["--quantization", "fp8"] if weights == "fp8" else []
    if arguments.start_together:  # vLLM would give the first all memory, and count that of others as its own
        cache = kv_cache_bytes(config, at_most * (PROMPT + ANSWER), len(gpus))
        options += ["--gpu-memory-utilization", str(SHARE), "--kv-cache-memory-bytes", str(cache)]
    with ExitStack() as ending:
        scratch = ending.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        if weights == "int4":
            for file in folder.glob("tokenizer*"):
                shutil.copy(file, scratch)
            int4 = config_of(arguments.model, weights) | {"num_hidden_layers": config["num_hidden_layers"]}
            Path(scratch, "config.json").write_text(json.dumps(int4))
            folder, options = Path(scratch), [*options, "--load-format", "dummy"]
        clients = ending.enter_context(Clients())
        began = time.perf_counter()
        command = [*VLLM, "serve", str(folder), *options]
        ending.enter_context(running(command, server.port, server_environment(weights, gpus, scratch)))
        return Started(server, time.perf_counter() - began, clients, ending.pop_all())


def kv_cache_bytes(config: dict[str, Any], tokens: int, gpus: int) -> int:
    """Of so many tokens' keys and values in bf16, on each of the GPUs that share their heads."""
    heads = max(1, config["num_key_value_heads"] // gpus)
    return tokens * config["num_hidden_layers"] * heads * head_size(config) * 2 * torch.bfloat16.itemsize


def server_environment(weights: str, gpus: list[str], scratch: str) -> dict[str, str]:
    """A server's environment.  It compiles into a cache of its own below scratch: vLLM writes some of its files in
    place, where another server of the same model could read half of one."""
    environment = environment_of(gpus) | {
        "VLLM_CACHE_ROOT": str(Path(scratch, "cache")),
        "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": "uniform_random",
    }
    environment.pop(FP8_VARIABLE, None)
    return environment | ({FP8_VARIABLE: "1"} if weights == PREFILL_FP8 else {})


@contextmanager
def running(command: list[str], port: int, environment: Mapping[str, str]) -> Iterator[None]:
    """A server, from when it answers.  Raises MeasurementError when another is there already, or, with its errors,
    when it ends before or takes too long; standard error then gets all that it said."""
    health = f"http://127.0.0.1:{port}/health"
    if answers(health):
        raise MeasurementError(f"another server answers at port {port} already: give another --port")
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        try:
            if failed := failed_start(process, health):
                said.seek(0)
                words = said.read()
                print(words, end="", file=sys.stderr, flush=True)
                raise MeasurementError(f"vllm serve {failed}: {why_failed(words)}")
            yield
        finally:
            process.terminate()
            process.wait()


def failed_start(process: subprocess.Popen[bytes], health: str) -> str | None:
    """Waits for a server to answer; what it did instead, if it did not."""
    limit = time.monotonic() + START_LIMIT
    while not answers(health):
        if process.poll() is not None:
            return f"ended with status {process.returncode} before it answered"
        if time.monotonic() > limit:
            return f"did not answer within {START_LIMIT} seconds"
        time.sleep(0.5)
    return None


def answers(url: str) -> bool:
    """Whether a server is there."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def main() -> None:
    """Prints what is measured as it comes, and writes it with --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--only", choices=PARTS, action="append", help="these parts, on what an earlier run left")
    parser.add_argument("--layers", type=int, help="of the model, the first so many; default all")
    parser.add_argument("--source", type=Path, default=Path("/dev/shm/end-to-end/source"))
    parser.add_argument("--packed", type=Path, default=Path("/dev/shm/end-to-end/packed"))
    parser.add_argument(
        "--compress-option", action="append", default=[], help="handed on, e.g. --compress-option=--code"
    )
    parser.add_argument("--weights", choices=WEIGHTS, action="append", help="to serve; default all")
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1], help="GPUs of a server; several in turn")
    parser.add_argument(
        "--expert-parallel", action="store_true", help="with several GPUs, also servers that share out whole experts"
    )
    parser.add_argument("--start-together", action="store_true", help="all servers, which then share the GPUs' memory")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--port", type=int, default=8000, help="of the first server; the others have the next ones")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.weights = arguments.weights or WEIGHTS
    parts, gpus = arguments.only or PARTS, visible_gpus()
    if "serve" in parts and (most := max(arguments.tensor_parallel)) > len(gpus):
        sys.exit(f"--tensor-parallel {most} needs as many GPUs, and CUDA sees {len(gpus)}")
    result: dict[str, Any] = {
        "model": arguments.model,
        "layers": arguments.layers or MODELS[arguments.model]["num_hidden_layers"],
        "device": torch.cuda.get_device_name(),
        "devices": len(gpus),
        "torch": torch.__version__,
        "driver": driver(),
    }

    def keep(part: str, measured: Any) -> None:
        result[part] = measured
        if part != "serve":  # its rows were printed as they came
            print(json.dumps({part: measured}), flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=2) + "\n")

    if "write" in parts:
        began = time.perf_counter()
        # In a process of its own: the pinned memory that tensors went through is kept until that ends.
        with ProcessPoolExecutor(1, get_context("spawn")) as apart:
            written = apart.submit(write_checkpoint, arguments.model, arguments.source, arguments.layers).result()
        keep("write", {"bytes": written, "seconds": time.perf_counter() - began})
    if "compress" in parts:
        keep("compress", compress(arguments.source, arguments.packed, arguments.compress_option))
    if "serve" in parts:
        result["start_together"] = arguments.start_together
        for rows in serve_all(arguments, rounds_of(arguments, gpus)):
            keep("serve", rows)
        if any("failed" in row for row in rows if row["weights"] == "packed"):
            sys.exit("the packed model was not served")


if __name__ == "__main__":
    main()
