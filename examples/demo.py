"""The whole path on a tiny model: compress it, serve it with vLLM, ask it something, and count what it cost.

python examples/demo.py
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from openai import OpenAI

EXAMPLE = Path(__file__).resolve().parent / "tiny-moe"
BIN = Path(sys.executable).parent
START_SECONDS = 600


def run(*words: str | Path) -> str:
    """Output of a `puzzlemoe` command."""
    print("$ puzzlemoe", *words, flush=True)
    command = [BIN / "puzzlemoe", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@contextmanager
def server(model: Path, log: Path) -> Iterator[OpenAI]:
    """A `vllm serve` of the model and a client for it; stopped at the end, whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    command = [BIN / "vllm", "serve", model, "--served-model-name", "tiny-moe", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--max-model-len", "512", "--max-num-seqs", "8"]
    print("$ vllm serve", *command[2:], flush=True)
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log)
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"vllm serve ended with status {process.returncode}:\n{log.read_text()[-4000:]}")
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    sys.exit(f"vllm serve did not answer within {START_SECONDS} s:\n{log.read_text()[-4000:]}")


def main() -> None:
    """Prints a completion, a streamed completion, and a small table of before and after."""
    source = EXAMPLE / "model"
    with tempfile.TemporaryDirectory() as scratch:
        packed = Path(scratch) / "tiny-moe-puzzle"
        options = ["--samples", "64", "--sequence-length", "512"]
        print(run("compress", source, packed, "--calibration", EXAMPLE / "calibration.txt", *options))
        facts, perplexity = {}, {}
        for title, model in (("before", source), ("after", packed)):
            sizes = json.loads(run("inspect", model, "--json"))["bytes"]
            facts[title] = sum(size for part, size in sizes.items() if part.startswith("experts"))
            scored = run("perplexity", model, "--text", EXAMPLE / "heldout.txt", "--sequence-length", "512", "--json")
            perplexity[title] = json.loads(scored)["perplexity"]
        with server(packed, Path(scratch) / "server.log") as client:
            prompt = "The king said to his servants,"
            answer = client.completions.create(model="tiny-moe", prompt=prompt, max_tokens=40, temperature=0)
            print(f"\ncompletion: {prompt}{answer.choices[0].text}")
            print(f"\nstreamed:   {prompt}", end="", flush=True)
            stream = client.completions.create(model="tiny-moe", prompt=prompt, max_tokens=40, seed=1, stream=True)
            for chunk in stream:
                print(chunk.choices[0].text, end="", flush=True)
            print("\n")
    print(f"{'':24}{'before':>12}{'after':>12}")
    print(f"{'expert bytes':24}{facts['before']:>12,}{facts['after']:>12,}")
    print(f"{'perplexity (held out)':24}{perplexity['before']:>12.3f}{perplexity['after']:>12.3f}")


if __name__ == "__main__":
    main()
