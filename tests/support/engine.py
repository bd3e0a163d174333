"""Real vLLM in a process of its own, which loads one model after another.

Run as a script it is that process: it reads one request per line from stdin and answers on the pipe that its argument
names; vLLM itself writes to stdout as it likes.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS = [random.Random(length).choices(range(256), k=length) for length in range(1, 13)]
"""Random token ids of the tiny models; together they visit every expert."""

LENGTH = 10
"""Tokens generated after each prompt."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_MLA_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

SMALL = {
    "dtype": "bfloat16",
    "enable_prefix_caching": False,
    "max_model_len": 64,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 16,
    "num_gpu_blocks_override": 64,
    "seed": 0,
    "skip_tokenizer_init": True,
}
"""Arguments of vllm.LLM that make loading a tiny model quick."""


STAND_INS = Path(__file__).with_name("stand_ins")
"""A folder with modules for packages that vLLM's CPU build imports and does not bring."""


class EngineError(Exception):
    """vLLM raised; the text is its exception's type and message."""


@dataclass(frozen=True)
class Step:
    """One generated token, its log-probability, and how far the next likeliest token is below it."""

    token: int
    logprob: float
    margin: float


class Engine:
    """A vLLM process.  Started at the first request."""

    def __init__(self, log: Path, **environment: str):
        self.log, self.environment = log, environment
        self.process: subprocess.Popen[str] | None = None
        self.generated: dict[str, list[list[Step]]] = {}

    def generate(self, model: Path, **options: Any) -> list[list[Step]]:
        """Greedy continuations of PROMPTS, by a vllm.LLM(model, **options) of its own.  Raises EngineError.

        Asked again, it answers from memory: models do not change once they were served.
        """
        request = {"model": str(model), "options": SMALL | options}
        key = json.dumps(request, sort_keys=True)
        if key not in self.generated:
            self.generated[key] = [[Step(*step) for step in steps] for steps in self._ask(request)]
        return self.generated[key]

    def refuses(self, model: Path, **options: Any) -> str:
        """The error with which vllm.LLM(model, **options) does not start."""
        try:
            self.generate(model, enforce_eager=True, **options)
        except EngineError as error:
            return str(error)
        raise AssertionError(f"vLLM served {model} with {options}")

    def reload(
        self, model: Path, other: Path | None = None, sleep: int = 0, **options: Any
    ) -> tuple[list[list[Step]], list[list[Step]], list[str]]:
        """Continuations of PROMPTS before and after the weights were lost and loaded again, and the names of tensors
        that then differ or moved.  Raises EngineError.

        other: load that folder's weights instead.  sleep: lose them by vLLM's sleep of that level.
        """
        request = {"model": str(model), "other": str(other or model), "sleep": sleep, "options": SMALL | options}
        *generated, changed = self._ask(request)
        before, after = ([[Step(*step) for step in steps] for steps in run] for run in generated)
        return before, after, changed

    def puzzlemoe(self, *arguments: Any) -> str:
        """What `puzzlemoe ...` prints.  Raises EngineError."""
        return self._ask({"arguments": [str(argument) for argument in arguments]})

    def stop(self) -> None:
        if self.process:
            self.process.kill()  # between requests it holds nothing, and its orderly end takes seconds
            self.process.wait()
            self.process.stdin.close()
            self.answers.close()

    def _ask(self, request: dict[str, Any]) -> Any:
        if self.process is None:
            self._start()
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.answers.readline()
        if not line:
            raise AssertionError(f"the vLLM process died: {self.log.read_text()[-3000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer["result"]

    def _start(self) -> None:
        reader, writer = os.pipe()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(writer)],
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": _search_path(), **self.environment},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(writer,),
                text=True,
            )
        os.close(writer)
        self.answers = os.fdopen(reader)


def _search_path() -> str:
    """PYTHONPATH of vLLM and the processes that it starts: as here, and with the stand-ins that are needed."""
    needed = [] if importlib.util.find_spec("torchvision") else [str(STAND_INS)]
    return os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parents[1]), *needed])


def _generate(model: str, options: dict[str, Any]) -> list[Any]:
    from vllm import LLM

    return _continue(LLM(model, **options))


def _continue(llm: Any) -> list[Any]:
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(temperature=0, max_tokens=LENGTH, logprobs=2, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in PROMPTS], sampling, use_tqdm=False)
    return [
        [_step(*chosen) for chosen in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)]
        for output in outputs
    ]


def _reload(model: str, other: str, sleep: int, options: dict[str, Any]) -> list[Any]:
    from vllm import LLM

    llm = LLM(model, enable_sleep_mode=bool(sleep), **options)
    before, (held,) = _continue(llm), llm.apply_model(_tensors)
    if sleep:
        llm.sleep(sleep)
        llm.wake_up(tags=["weights"])
    else:
        llm.apply_model(_forget)
    if sleep != 1:
        llm.collective_rpc("reload_weights", kwargs={} if other == model else {"weights_path": other})
    if sleep:
        llm.wake_up(tags=["kv_cache"])
    (found,) = llm.apply_model(_tensors)
    changed = [name for name in held.keys() | found.keys() if held.get(name) != found.get(name)]
    return [before, _continue(llm), sorted(changed)]


def _maps(module: Any) -> dict[str, Any]:
    """Tensors of the plugin's layers that are no parameters."""
    maps = {name: getattr(module, name, None) for name in ("puzzle_map", "puzzle_centres")}
    return {name: tensor for name, tensor in maps.items() if tensor is not None}


def _tensors(model: Any) -> dict[str, tuple[int, str]]:
    """Address and digest of every parameter and of the plugin's maps."""
    import hashlib

    import torch

    named = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        named |= {f"{prefix}.{name}": tensor for name, tensor in _maps(module).items()}
    as_bytes = {name: tensor.detach().contiguous().view(-1).view(torch.uint8).cpu() for name, tensor in named.items()}
    return {
        name: (named[name].data_ptr(), hashlib.sha256(data.numpy().tobytes()).hexdigest())
        for name, data in as_bytes.items()
    }


def _forget(model: Any) -> None:
    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *_maps(module).values()]:
            tensor.detach().zero_()


def _step(token: int, logprobs: dict[int, Any]) -> tuple[int, float, float]:
    """The fields of a Step.  Of equally likely tokens vLLM may choose one and rank another first."""
    logprob = logprobs[token].logprob
    return token, logprob, logprob - max(entry.logprob for other, entry in logprobs.items() if other != token)


def _puzzlemoe(arguments: list[str]) -> str:
    from typer.testing import CliRunner

    from puzzlemoe_offline.cli.main import app

    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def main() -> None:
    from support.vllm_on_cpu import help_along
    from vllm.distributed import cleanup_dist_env_and_memory

    answers = os.fdopen(int(sys.argv[1]), "w")
    # vLLM collects garbage nine times per engine, half a second each; these models leave little of it.
    gc.collect = lambda generation=2: 0
    help_along()
    for line in sys.stdin:
        try:
            request = json.loads(line)
            run = _reload if "sleep" in request else _generate if "model" in request else _puzzlemoe
            answer = {"result": run(**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        cleanup_dist_env_and_memory()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
