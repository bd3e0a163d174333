"""A server that fails, or answers only some prompts, gives no figures, and a row of the results says why; servers that
are measured side by side have their own GPUs, ports and caches, and none is measured while another starts."""

from __future__ import annotations

import argparse
import json
import socket
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

FIGURES = dict.fromkeys(("request_throughput", "output_throughput", "mean_ttft_ms", "mean_tpot_ms", "p99_tpot_ms"), 1.0)

COMMAND = """
import http.server, json, os, signal, sys
words = sys.argv
value = lambda name: words[words.index(name) + 1]
port = value("--port")

def log(event):
    with open(os.path.join(FOLDER, "log"), "a") as file:
        file.write(f"{event} {port}\\n")

def end(*_):
    log("ended")
    os._exit(0)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *words):
        pass

signal.signal(signal.SIGTERM, end)
names = ("CUDA_VISIBLE_DEVICES", "PUZZLEMOE_FP8_PREFILL", "VLLM_CACHE_ROOT", "VLLM_PORT")
config = os.path.join(words[2], "config.json")
said = {name: os.environ.get(name) for name in names} | {"model": words[2], "words": words[3:]}
said["config"] = json.load(open(config)) if os.path.exists(config) else None
http.server.HTTPServer.allow_reuse_address = True
server = http.server.HTTPServer(("127.0.0.1", int(port)), Handler)
open(os.path.join(FOLDER, port + ".json"), "w").write(json.dumps(said))
log("started")
server.serve_forever()
"""
"""A command in the place of vLLM's that serves, as far as it is asked here, and logs when."""

BENCH = """
import json, os

def add_cli_args(parser):
    for name in ("base-url", "dataset-name", "random-input-len", "random-output-len", "num-prompts", "max-concurrency"):
        parser.add_argument("--" + name)
    parser.add_argument("--ignore-eos", action="store_true")

def main(arguments):
    with open(os.path.join(FOLDER, "log"), "a") as file:
        file.write(f"measured {arguments.base_url.rsplit(':', 1)[1]}\\n")
    if ERROR:
        raise ValueError(ERROR)
    prompts = int(arguments.num_prompts) - UNANSWERED
    return RESULT | {"completed": prompts, "request_throughput": int(arguments.random_output_len)}
"""
"""A module in the place of vLLM's benchmark, which logs too.  As the throughput of requests it gives the tokens that
were asked for."""


@pytest.fixture
def modules(monkeypatch):
    """benchmarks/serving.py and end_to_end.py."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import end_to_end
    import serving

    yield serving, end_to_end
    for name in ("serving", "gpu_groups", "end_to_end"):
        del sys.modules[name]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Puts BENCH in the place of vLLM's for other processes: it leaves prompts unanswered, or raises an error."""

    def make(unanswered: int = 0, error: str = "") -> None:
        for module in ("benchmarks/serve.py", "utils/argparse_utils.py"):
            file = tmp_path / "site" / "vllm" / module
            file.parent.mkdir(parents=True, exist_ok=True)
            for folder in (file.parent, file.parent.parent):
                (folder / "__init__.py").touch()
        result = {"model_id": "model"} | FIGURES
        given = f"FOLDER, UNANSWERED, ERROR, RESULT = {(str(tmp_path), unanswered, error, result)!r}\n"
        (tmp_path / "site/vllm/benchmarks/serve.py").write_text(given + BENCH)
        parser = "from argparse import ArgumentParser as FlexibleArgumentParser\n"
        (tmp_path / "site/vllm/utils/argparse_utils.py").write_text(parser)
        monkeypatch.setattr("sys.path", [str(tmp_path / "site"), *sys.path])

    make()
    return make


@pytest.fixture
def options(tmp_path):
    """Arguments of end_to_end.py, of which some are given; folders of the two models, with empty weights."""
    for name in ("source", "packed"):
        (tmp_path / name).mkdir()
        shape = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
        (tmp_path / name / "config.json").write_text(json.dumps(shape))

    def make(**given: object) -> argparse.Namespace:
        usual = {"model": "mixtral-8x7b", "source": tmp_path / "source", "packed": tmp_path / "packed"}
        usual |= {"tensor_parallel": [1], "expert_parallel": False, "start_together": False, "clients": [1]}
        return argparse.Namespace(**(usual | given))

    return make


def is_free(port: int) -> bool:
    """Whether no server has that port."""
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture
def served(modules, bench, tmp_path, monkeypatch):
    """Puts COMMAND in the place of vLLM's; says what its servers were given, by their position, and what happened."""
    ports = 6
    first = next(port for port in range(20_000, 32_000, ports) if all(map(is_free, range(port, port + ports))))
    script = tmp_path / "vllm_command.py"
    script.write_text(f"FOLDER = {str(tmp_path)!r}\n{COMMAND}")
    monkeypatch.setattr(modules[1], "VLLM", (sys.executable, str(script)))

    class Served:
        port = first

        def given(self, position: int) -> dict[str, object]:
            return json.loads((tmp_path / f"{first + position}.json").read_text())

        def log(self) -> list[tuple[str, int]]:
            """What happened, and the position of the server."""
            lines = map(str.split, (tmp_path / "log").read_text().splitlines())
            return [(event, int(port) - first) for event, port in lines]

    return Served()


def rows(end_to_end, arguments: argparse.Namespace, gpus: list[str]) -> list[list[dict[str, object]]]:
    """What serve_all yields."""
    return list(end_to_end.serve_all(arguments, end_to_end.rounds_of(arguments, gpus)))


def test_figures_of_prompts_that_all_were_answered(modules, bench):
    with modules[0].Clients() as clients:
        row = clients.measure("http://127.0.0.1:1", 2, 8)
    expected = {"url": "http://127.0.0.1:1", "concurrency": 2, "answer_tokens": 128, "model_id": "model"}
    assert row == FIGURES | expected | {"request_throughput": 128}


@pytest.mark.parametrize(
    ("unanswered", "error", "reason"), [(1, "", "7 of 8 prompts of 2 clients"), (0, "no luck", "failed: no luck")]
)
def test_no_figures_of_others(modules, bench, unanswered, error, reason):
    bench(unanswered, error)
    with modules[0].Clients() as clients, pytest.raises(modules[0].MeasurementError, match=reason):
        clients.measure("http://127.0.0.1:1", 2, 8)


def test_a_server_that_ends_is_a_row_with_its_last_words(modules, bench, options, monkeypatch):
    code = "import sys; print('starting'); sys.exit('no room for it')"
    monkeypatch.setattr(modules[1], "VLLM", (sys.executable, "-u", "-c", code))
    arguments = options(weights=["fp8"], port=1, tensor_parallel=[2], expert_parallel=True)
    tensor, expert = rows(modules[1], arguments, ["0", "1"])[-1]
    said = "vllm serve ended with status 1 before it answered: starting | no room for it"
    assert expert == {"weights": "fp8", "tensor_parallel": 2, "expert_parallel": True, "failed": said}
    assert tensor == expert | {"expert_parallel": False}


def test_a_server_that_hangs_is_a_row_with_its_last_words(modules, bench, options, monkeypatch):
    code = "import time; print('waiting for a GPU'); time.sleep(100)"
    monkeypatch.setattr(modules[1], "VLLM", (sys.executable, "-u", "-c", code))
    monkeypatch.setattr(modules[1], "START_LIMIT", 1)
    [[row]] = rows(modules[1], options(weights=["fp8"], port=1), ["0"])
    assert row["failed"] == "vllm serve did not answer within 1 seconds: waiting for a GPU"


def test_errors_are_why_a_server_failed(modules):
    said = (
        "(Worker pid=7) ERROR [a.py:1]     raise ValueError(why)\n"
        "(Worker pid=7) ERROR [a.py:1] ValueError: X=1: no kernels\n"
        "(Worker pid=8) ERROR [a.py:1] ValueError: X=1: no kernels\n"
        "RuntimeError: Engine core initialization failed.\nthe end\n"
    )
    assert (
        modules[0].why_failed(said) == "ValueError: X=1: no kernels | RuntimeError: Engine core initialization failed."
    )
    assert modules[0].why_failed("".join(f"{number}\n" for number in range(30))).startswith("10 | 11")


def test_weights_that_do_not_fit_are_a_row_that_says_so(modules, options, monkeypatch):
    arguments = options(weights=["bf16"], port=1, tensor_parallel=[2])
    (arguments.source / "layer.safetensors").write_bytes(bytes(3_000))
    memory = argparse.Namespace(total_memory=1_000)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: memory)
    [[row]] = rows(modules[1], arguments, ["0", "1"])
    assert "do not fit" in row["failed"]


def test_a_port_that_another_server_has_is_a_row_that_says_so(modules, served, options):
    other = modules[1].running([*modules[1].VLLM, "serve", "model", "--port", str(served.port)], served.port, {})
    with other:
        [[row]] = rows(modules[1], options(weights=["fp8"], port=served.port), ["0"])
    assert "already: give another --port" in row["failed"]


def test_more_gpus_than_there_are_are_refused_before_anything_is_written(modules, monkeypatch):
    monkeypatch.setattr(modules[1], "visible_gpus", lambda: ["0"])
    monkeypatch.setattr("sys.argv", ["end_to_end.py", "--tensor-parallel", "1", "2"])
    with pytest.raises(SystemExit, match="2 needs as many GPUs, and CUDA sees 1"):
        modules[1].main()


def test_int4_has_as_many_layers_as_the_source(modules, served, options):
    arguments = options(weights=["int4"], port=served.port)
    (arguments.source / "tokenizer.json").write_text("{}")
    [[row, prefill]] = rows(modules[1], arguments, ["0"])
    assert row["output_throughput"] == 1.0
    assert (row["concurrency"], row["answer_tokens"], row["request_throughput"]) == (1, 128, 128)
    assert (prefill["concurrency"], prefill["answer_tokens"], prefill["request_throughput"]) == (32, 1, 1)
    given = served.given(0)
    assert given["config"]["num_hidden_layers"] == 4 and given["config"]["quantization_config"]["bits"] == 4
    assert given["words"][-2:] == ["--load-format", "dummy"]


def test_servers_side_by_side(modules, served, options, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_PORT", "1")
    monkeypatch.setenv("PUZZLEMOE_FP8_PREFILL", "1")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: argparse.Namespace(total_memory=1))
    weights = ("packed", "packed, prefill in FP8", "bf16")
    arguments = options(weights=weights, tensor_parallel=[2], port=served.port)
    kept = rows(modules[1], arguments, ["4", "5", "6", "7"])
    twice = [name for name in weights for _ in range(2)]  # with one number of clients, and prefill
    assert [[row["weights"] for row in each] for each in kept] == [twice[:4], twice]
    assert all(row["tensor_parallel"] == 2 and row["output_throughput"] == 1.0 for row in kept[-1])
    first, second, third = (served.given(position) for position in range(3))
    assert [each["CUDA_VISIBLE_DEVICES"] for each in (first, second, third)] == ["4,5", "6,7", "4,5"]
    assert [each["PUZZLEMOE_FP8_PREFILL"] for each in (first, second, third)] == [None, "1", None]
    assert len({each["VLLM_CACHE_ROOT"] for each in (first, second, third)}) == 3
    assert {each["VLLM_PORT"] for each in (first, second, third)} == {None}
    assert [each["model"] for each in (first, third)] == [str(tmp_path / "packed"), str(tmp_path / "source")]
    for each in (first, second, third):
        assert each["words"][each["words"].index("--tensor-parallel-size") + 1] == "2"
        assert "--kv-cache-memory-bytes" not in each["words"]
    phases = served.log()
    for events in (phases[:2], phases[2:6], phases[6:8]):
        assert {position for _, position in events} == {0, 1} and len({event for event, _ in events}) == 1
    assert phases[8:] == [("started", 2), ("measured", 2), ("measured", 2), ("ended", 2)]


def test_servers_that_start_together_are_measured_in_turn(modules, served, options):
    arguments = options(weights=["packed", "fp8"], tensor_parallel=[1, 2], expert_parallel=True, port=served.port)
    arguments.start_together = True
    kept = rows(modules[1], arguments, ["0", "1"])
    layouts = [(row["weights"], row["tensor_parallel"], row["expert_parallel"]) for row in kept[-1][::2]]
    expected = [(1, False), (2, False), (2, True)]
    assert layouts == [(weights, *layout) for layout in expected for weights in ("packed", "fp8")]
    assert [served.given(position)["CUDA_VISIBLE_DEVICES"] for position in range(6)] == ["0", "1", *["0,1"] * 4]
    phases = served.log()
    assert {event for event, _ in phases[:6]} == {"started"} and {event for event, _ in phases[-6:]} == {"ended"}
    measured = phases[6:-6]
    assert {event for event, _ in measured} == {"measured"}
    assert {position for _, position in measured[:4]} == {0, 1}
    assert [position for _, position in measured[4:]] == [2, 2, 3, 3, 4, 4, 5, 5]
    for position, heads in ((0, 2), (2, 1)):  # of 4 layers, 2 bytes each for key and value, heads of 2 columns
        words = served.given(position)["words"]
        assert words[words.index("--kv-cache-memory-bytes") + 1] == str(32 * 1152 * 4 * heads * 2 * 2 * 2)


def test_a_server_that_fails_holds_up_no_other(modules, served, options, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: argparse.Namespace(total_memory=-1))
    arguments = options(weights=["bf16", "fp8"], port=served.port, start_together=True)
    [_, [bf16, *fp8]] = rows(modules[1], arguments, ["0"])
    assert "do not fit" in bf16["failed"] and [row["weights"] for row in fp8] == ["fp8", "fp8"]
    assert not any("failed" in row for row in fp8)
