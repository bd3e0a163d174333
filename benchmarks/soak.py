#!/usr/bin/env python3
"""Two servers under friendly and hostile requests, side by side: does the packed model's memory grow where the dense
one's does not?

    benchmarks/soak.py PACKED DENSE --minutes 60 --output results/soak.json

DENSE is the control, such as `puzzlemoe unpack PACKED DENSE` writes.  Both are served with the same options and get the
same requests: of the clients a third asks for what no server should give (damaged JSON, wrong models, endless prompts,
negative numbers) or hangs up in the middle of an answer.  Memory is that of the server's processes together, sampled
every ten seconds; growth is the slope of a straight line through the second half.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shlex
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy
import psutil
import torch

SAMPLE_SECONDS = 10.0
PROMPTS = [f"Chapter {number}. The king said to his" + " servants" * (number % 7) for number in range(40)]


@dataclass
class Server:
    """One `vllm serve`, what it answered, and its memory over time."""

    model: Path
    port: int
    process: subprocess.Popen[bytes]
    answers: Counter[str] = field(default_factory=Counter)
    texts: dict[str, str] = field(default_factory=dict)
    other_texts: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the start, and bytes."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def bytes(self) -> int:
        """Of all its processes; memory that they share counts once, by proportion."""
        parent = psutil.Process(self.process.pid)
        return sum(process.memory_full_info().pss for process in [parent, *parent.children(recursive=True)])

    def growth(self) -> float:
        """MB an hour, over the second half of the samples."""
        half = self.memory[len(self.memory) // 2 :]
        seconds, sizes = numpy.array(half).T
        return float(numpy.polyfit(seconds / 3600, sizes / 1e6, 1)[0])


def start(model: Path, log: Path, options: list[str]) -> Server:
    """A server on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", "soaked"]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("w") as output:
        return Server(model, port, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))


def wait_until_healthy(server: Server, log: Path) -> None:
    while True:
        if server.process.poll() is not None:
            sys.exit(f"{server.model}: the server ended, see {log}")
        try:
            if httpx.get(f"{server.url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)


async def friendly(client: httpx.AsyncClient, server: Server, rng: random.Random) -> str:
    prompt = rng.choice(PROMPTS)
    body = {"model": "soaked", "prompt": prompt, "max_tokens": 16, "temperature": 0}
    answer = await client.post(f"{server.url}/v1/completions", json=body)
    if answer.status_code == 200:
        text = answer.json()["choices"][0]["text"]
        server.other_texts += server.texts.setdefault(prompt, text) != text
    return str(answer.status_code)


async def hangs_up(client: httpx.AsyncClient, server: Server, rng: random.Random) -> str:
    body = {"model": "soaked", "prompt": rng.choice(PROMPTS), "max_tokens": 200, "stream": True}
    async with client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        async for _ in answer.aiter_bytes():
            return "hung up"
    return "hung up"


async def nonsense(client: httpx.AsyncClient, server: Server, rng: random.Random) -> str:
    bodies: list[Any] = [
        b'{"model": "soaked", "prompt": ',
        {"model": "another", "prompt": "a"},
        {"model": "soaked", "prompt": "a " * 100_000},
        {"model": "soaked", "prompt": "a", "max_tokens": -1},
        {"model": "soaked", "prompt": "a", "temperature": "hot"},
        {"model": "soaked", "prompt": [-1, 1 << 40]},
        {"model": "soaked", "prompt": "a", "logprobs": 10_000},
        {"model": "soaked", "prompt": "a", "n": -3},
        {"model": "soaked", "prompt": ["a"] * 30, "max_tokens": 1},
    ]
    body = rng.choice(bodies)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    answer = await client.post(f"{server.url}/v1/completions", content=content, headers=headers)
    return f"nonsense {answer.status_code}"


async def one_client(server: Server, number: int, until: float) -> None:
    rng = random.Random(number)
    async with httpx.AsyncClient(timeout=300) as client:
        while time.monotonic() < until:
            asks = friendly if number % 3 else rng.choice((hangs_up, nonsense))
            try:
                server.answers[await asks(client, server, rng)] += 1
            except httpx.HTTPError as error:
                server.answers[type(error).__name__] += 1


async def sample(servers: list[Server], until: float) -> None:
    began = time.monotonic()
    while time.monotonic() < until:
        for server in servers:
            server.memory.append((time.monotonic() - began, server.bytes()))
        await asyncio.sleep(SAMPLE_SECONDS)


async def soak(servers: list[Server], minutes: float, clients: int) -> None:
    until = time.monotonic() + 60 * minutes
    tasks = [one_client(server, number, until) for server in servers for number in range(clients)]
    await asyncio.gather(sample(servers, until), *tasks)


def main() -> None:
    """Prints a line for each server and writes the JSON; exits with 1 when a server failed a request or died."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64, help="of each server")
    parser.add_argument("--logs", type=Path, default=Path("."), help="folder for the servers' logs")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--serve", default="", help="options of vllm serve, in one string")
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    logs = [arguments.logs / name for name in ("packed.log", "dense.log")]
    servers: list[Server] = []
    try:
        # One after the other: while vLLM measures a GPU's free memory, nobody else may take of it.
        for model, log in zip((arguments.packed, arguments.dense), logs, strict=True):
            servers.append(start(model, log, shlex.split(arguments.serve)))
            wait_until_healthy(servers[-1], log)
        asyncio.run(soak(servers, arguments.minutes, arguments.clients))
        alive = [server.process.poll() is None for server in servers]
    finally:
        for server in servers:
            server.process.terminate()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    rows = {}
    for name, server in zip(("packed", "dense"), servers, strict=True):
        sizes = [size for _, size in server.memory]
        rows[name] = {
            "answers": dict(sorted(server.answers.items())),
            "greedy texts unlike the first": server.other_texts,
            "memory_mb": {"first": sizes[0] / 1e6, "last": sizes[-1] / 1e6, "largest": max(sizes) / 1e6},
            "growth_mb_per_hour": server.growth(),
        }
        print(name, json.dumps(rows[name]), flush=True)
    result = {"machine": gpu or f"{platform.machine()} CPU", "minutes": arguments.minutes, "clients": arguments.clients}
    arguments.output.write_text(json.dumps(result | rows, indent=2) + "\n")
    faults = [
        answer for server in servers for answer in server.answers if answer[-3:].isdigit() and answer[-3:] >= "500"
    ]
    sys.exit(bool(faults) or not all(alive))


if __name__ == "__main__":
    main()
