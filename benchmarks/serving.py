"""Whole models in vLLM with random weights: weight memory, room for the KV cache, prefill and decode speed.

    python benchmarks/serving.py --model qwen3-30b-a3b --weights bf16 --weights angle8 --output results.json
    python benchmarks/serving.py --url http://127.0.0.1:8000 --concurrency 32    # a running server

With --url, `vllm bench serve` does the measuring.  Otherwise each kind of weights runs in a process of its own on the
same machine, with prompts of random tokens, all of one length.
The weights are random: speed does not depend on what a model says, only on its shape and on which experts are picked.
vLLM's routing simulator picks them, uniformly, independently and anew for every token.  A router that sees what random
weights of some kinds come to, not numbers for one, may send all tokens to the same few experts, which is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

from puzzlemoe_vllm.format.codes import CODES, GROUP_SIZES

PROMPT, ANSWER = 1024, 128
DECODE = 64
"""Output tokens of a prompt whose decode steps are timed."""

ERROR = re.compile(r"\b[\w.]*(?:Error|Exception): \S.*")
LAST_ERRORS, LAST_LINES = 5, 20
"""Of what a failing process said, that are kept."""

_SHARED = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "torch_dtype": "bfloat16", "max_position_embeddings": 8192}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": _SHARED
    | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": _SHARED
    | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
}
OURS = tuple(CODES)
WEIGHTS = ("bf16", "fp8", "int4", *OURS)


def config_of(model: str, weights: str) -> dict[str, Any]:
    """config.json of a model with one kind of weights."""
    config = dict(MODELS[model])
    if weights == "int4":
        config["quantization_config"] = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
        }
    if weights in OURS:
        experts = config.get("num_local_experts") or config["num_experts"]
        config["quantization_config"] = {
            "quant_method": "puzzlemoe",
            "code": weights,
            "group_size": GROUP_SIZES[0] if CODES[weights].has_steps else None,
            "merged_experts": {str(layer): experts for layer in range(config["num_hidden_layers"])},
        }
    return config


def fill_experts(model: Any) -> int:
    """Gives experts' weights that are no bf16 random values, 16-bit pair words one small exponent; returns how many
    tensors it filled.

    Dummy loading leaves integers as the memory was, which may be anything, and may leave FP8 at zero.
    """
    import torch

    filled = 0
    for name, weights in model.named_parameters():
        if not name.endswith(("_puzzle", "qweight")) and weights.dtype != torch.float8_e4m3fn:
            continue
        for matrix in weights.data if weights.dim() == 3 else (weights.data,):
            if matrix.dtype == torch.uint8:
                matrix.random_(0, 256)
            elif matrix.dtype == torch.int16:
                matrix.random_(-(2**15), 2**15).bitwise_and_(~0x0F80).bitwise_or_(9 << 7)
            elif matrix.dtype == torch.int32:
                matrix.random_(-(2**31), 2**31)
            else:
                matrix.copy_(torch.randn(matrix.shape, dtype=torch.bfloat16, device=matrix.device))
        filled += 1
    torch.cuda.synchronize()
    return filled


def measure(model: str, weights: str, batches: list[int], gpu_memory: float) -> dict[str, Any]:
    """Loads one model and times it; runs in a process of its own."""
    os.environ |= {
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # lets apply_model below send a function
        "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": "uniform_random",
    }
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config_of(model, weights)))
        began = time.perf_counter()
        engine = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            quantization="fp8" if weights == "fp8" else None,
            max_model_len=PROMPT + DECODE + 8,
            max_num_seqs=max(batches),
            gpu_memory_utilization=gpu_memory,
            enable_prefix_caching=False,
            compilation_config={"cudagraph_capture_sizes": batches},
        )
        started = time.perf_counter() - began
    filled = sum(engine.apply_model(fill_experts))
    assert filled or weights == "bf16"

    def steps(batch: int, output: int) -> list[float]:
        prompts = [{"prompt_token_ids": torch.randint(10, 30000, (PROMPT,)).tolist()} for _ in range(batch)]
        sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
        return step_seconds(engine.llm_engine, prompts, sampling)

    rows = []
    for batch in batches:
        steps(batch, DECODE)
        prefill = min(steps(batch, 1)[0] for _ in range(3))
        step = statistics.median(seconds for _ in range(3) for seconds in steps(batch, DECODE)[1:])
        rows.append(
            {"batch": batch, "prefill_tokens_per_second": batch * PROMPT / prefill, "decode_step_ms": 1000 * step}
        )
    cache = engine.llm_engine.vllm_config.cache_config
    return {
        "model": model,
        "weights": weights,
        "weight_bytes": sum(engine.apply_model(parameter_bytes)),
        "kv_cache_tokens": cache.num_gpu_blocks * cache.block_size,
        "gpu_memory_utilization": gpu_memory,
        "start_seconds": started,
        "rows": rows,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
    }


def step_seconds(engine: Any, prompts: list[Any], sampling: Any) -> list[float]:
    """Of a vLLM engine: seconds until every prompt has had a token, then those of each step that gives one to all."""
    seconds: list[float] = []
    began = time.perf_counter()
    waiting = {str(number) for number in range(len(prompts))}
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, sampling)
    while engine.has_unfinished_requests():
        answered = {output.request_id for output in engine.step()}
        waiting -= answered
        if not waiting and (not seconds or len(answered) == len(prompts)):
            now = time.perf_counter()
            seconds.append(now - began)
            began = now
    return seconds


def parameter_bytes(model: Any) -> int:
    """Bytes of the model's parameters and buffers on the device."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


class MeasurementError(RuntimeError):
    """A measurement that has no figures; the text says why."""


def why_failed(said: str) -> str:
    """The last errors that a process named, each once, since vLLM's own last words are rarely the cause; without any,
    its last lines."""
    errors = dict.fromkeys(found[0] for found in ERROR.finditer(said))
    return " | ".join([*errors][-LAST_ERRORS:] or said.splitlines()[-LAST_LINES:])


class Clients:
    """The clients of a running server, by `vllm bench serve`, in a process of their own.  It imports vLLM once, and as
    soon as this is made: the server may still be starting then.  A context manager."""

    def __init__(self) -> None:
        self._process = ProcessPoolExecutor(1, get_context("spawn"))
        self._process.submit(bench_serve)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown()

    def measure(self, url: str, concurrency: int, prompts: int, answer: int = ANSWER) -> dict[str, Any]:
        """Figures with random prompts of `PROMPT` tokens; answer: tokens of each answer.

        Raises MeasurementError when there are none, or when some prompts were not answered: it has figures even then.
        """
        words = ["--base-url", url, "--dataset-name", "random", "--ignore-eos"]
        words += ["--random-input-len", str(PROMPT), "--random-output-len", str(answer)]
        words += ["--num-prompts", str(prompts), "--max-concurrency", str(concurrency)]
        try:
            result = self._process.submit(bench_serve, words).result()
        except Exception as error:
            raise MeasurementError(f"vllm bench serve at {concurrency} clients failed: {error}") from error
        if result["completed"] != prompts:
            raise MeasurementError(f"{result['completed']} of {prompts} prompts of {concurrency} clients were answered")
        kept = ("model_id", "request_throughput", "output_throughput", "mean_ttft_ms", "mean_tpot_ms", "p99_tpot_ms")
        return {"url": url, "concurrency": concurrency, "answer_tokens": answer} | {key: result[key] for key in kept}


def bench_serve(words: list[str] | None = None) -> dict[str, Any]:
    """What `vllm bench serve` finds with these options; without any it is only imported."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    return main(parser.parse_args(words)) if words else {}


def driver() -> str:
    """Version of the NVIDIA driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def main() -> None:
    """Prints a JSON line per measurement; a list of them with --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--weights", choices=WEIGHTS, action="append")
    parser.add_argument("--batch", type=int, action="append", help="default 1, 8, 32 and 128")
    parser.add_argument("--gpu-memory", type=float, default=0.92)
    parser.add_argument("--url", help="measure this running server instead")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    batches = arguments.batch or [1, 8, 32, 128]
    if arguments.url:
        with Clients() as clients:
            result = json.dumps(clients.measure(arguments.url, arguments.concurrency, 4 * arguments.concurrency))
        print(result)
        if arguments.output:
            arguments.output.write_text(result + "\n")
        return
    if arguments.in_process:
        result = measure(arguments.model, arguments.weights[0], batches, arguments.gpu_memory)
        arguments.output.write_text(json.dumps(result | {"driver": driver()}))
        return
    results = []
    for weights in arguments.weights or WEIGHTS:
        with tempfile.TemporaryDirectory() as folder:
            one = Path(folder, "one.json")
            command = [sys.executable, __file__, "--in-process", "--model", arguments.model, "--weights", weights]
            command += ["--gpu-memory", str(arguments.gpu_memory), "--output", str(one)]
            command += [word for batch in batches for word in ("--batch", str(batch))]
            done = subprocess.run(command, check=False)
            if done.returncode:
                sys.exit(f"{weights}: the measurement failed with status {done.returncode}")
            results.append(json.loads(one.read_text()))
        print(json.dumps(results[-1]), flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
