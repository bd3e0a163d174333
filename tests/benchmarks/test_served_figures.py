"""A server that fails, or answers only some prompts, gives no figures, and a row of the results says why; servers that
run side by side have their own GPUs, ports and caches, and their rows come in the order of the weights."""

from __future__ import annotations

import argparse
import json
import socket
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

FIGURES = dict.fromkeys(("request_throughput", "output_throughput", "mean_ttft_ms", "mean_tpot_ms", "p99_tpot_ms"), 1.0)

SERVER = """
import http.server, json, os, sys, time
words = sys.argv
value = lambda name: words[words.index(name) + 1]
if words[1] == "serve":
    names = ("CUDA_VISIBLE_DEVICES", "PUZZLEMOE_FP8_PREFILL", "VLLM_CACHE_ROOT", "VLLM_PORT")
    config = os.path.join(words[2], "config.json")
    said = {name: os.environ.get(name) for name in names} | {"model": words[2], "words": words[3:]}
    said["config"] = json.load(open(config)) if os.path.exists(config) else None
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
        def log_message(self, *words):
            pass
    http.server.HTTPServer.allow_reuse_address = True
    server = http.server.HTTPServer(("127.0.0.1", int(value("--port"))), Handler)
    open(os.path.join(FOLDER, value("--port") + ".json"), "w").write(json.dumps(said))
    server.serve_forever()
port = value("--base-url").rsplit(":", 1)[1]
if port in AFTER:
    while not os.path.exists(os.path.join(FOLDER, AFTER[port] + ".end")):
        time.sleep(0.05)
    time.sleep(1)
answer = int(value("--random-output-len"))
if answer == 1:
    open(os.path.join(FOLDER, port + ".end"), "w").close()
measured = {"completed": int(value("--num-prompts")), "request_throughput": answer}
open(os.path.join(value("--result-dir"), "result.json"), "w").write(json.dumps(RESULT | measured))
"""
"""A command in the place of vLLM's that serves, as far as it is asked here, and measures; at some ports it sleeps until
another server was measured.  As the throughput of requests it gives the tokens that were asked for."""


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
def vllm(modules, tmp_path, monkeypatch):
    """Makes a command in the place of vLLM's: it answers so many prompts, says something on both of its outputs, and
    ends with that status."""

    def make(answered: int, status: int = 0, said: tuple[str, str] = ("", "")) -> None:
        script = tmp_path / "vllm.py"
        result = json.dumps({"model_id": "model", "completed": answered} | FIGURES)
        script.write_text(
            f"import sys\nwords = sys.argv\nif '--result-dir' in words:\n"
            f"    open(words[words.index('--result-dir') + 1] + '/result.json', 'w').write({result!r})\n"
            f"print({said[0]!r}, flush=True)\nprint({said[1]!r}, file=sys.stderr)\nsys.exit({status})\n"
        )
        for module in modules:
            monkeypatch.setattr(module, "VLLM", (sys.executable, str(script)))

    return make


@pytest.fixture
def options(tmp_path):
    """Arguments of end_to_end.py, of which some are given; folders of the two models, with empty weights."""
    for name in ("source", "packed"):
        (tmp_path / name).mkdir()

    def make(**given: object) -> argparse.Namespace:
        usual = {"model": "mixtral-8x7b", "source": tmp_path / "source", "packed": tmp_path / "packed"}
        usual |= {"tensor_parallel": 1, "expert_parallel": False, "clients": [1]}
        return argparse.Namespace(**(usual | given))

    return make


def test_figures_of_prompts_that_all_were_answered(modules, vllm):
    vllm(answered=8)
    row = modules[0].measure_server("http://127.0.0.1:1", 2, 8)
    assert row == {"url": "http://127.0.0.1:1", "concurrency": 2, "answer_tokens": 128, "model_id": "model"} | FIGURES


@pytest.mark.parametrize(
    ("answered", "status", "reason"), [(7, 0, "7 of 8 prompts of 2 clients"), (8, 3, "failed with status 3")]
)
def test_no_figures_of_others(modules, vllm, answered, status, reason):
    vllm(answered, status)
    with pytest.raises(modules[0].MeasurementError, match=reason):
        modules[0].measure_server("http://127.0.0.1:1", 2, 8)


def test_a_server_that_ends_is_a_row_with_its_last_words(modules, vllm, options):
    vllm(answered=8, status=1, said=("starting", "no room for it"))
    rows = modules[1].serve("fp8", options(expert_parallel=True), 1, ["0"])
    said = "vllm serve ended with status 1 before it answered: starting | no room for it"
    assert rows == [{"weights": "fp8", "tensor_parallel": 1, "expert_parallel": True, "failed": said}]


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
    arguments = options(tensor_parallel=2)
    (arguments.source / "layer.safetensors").write_bytes(bytes(3_000))
    memory = argparse.Namespace(total_memory=1_000)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: memory)
    [row] = modules[1].serve("bf16", arguments, 1, ["0", "1"])
    assert "do not fit" in row["failed"]


def test_a_port_that_another_server_has_is_a_row_that_says_so(modules, served, options):
    other = modules[1].running([*modules[1].VLLM, "serve", "model", "--port", served.port], int(served.port), {})
    with other:
        [row] = modules[1].serve("fp8", options(), int(served.port), ["0"])
    assert "already: give another --port" in row["failed"]


def test_more_gpus_than_there_are_are_refused_before_anything_is_written(modules, monkeypatch):
    monkeypatch.setattr(modules[1], "visible_gpus", lambda: ["0"])
    monkeypatch.setattr("sys.argv", ["end_to_end.py", "--tensor-parallel", "2"])
    with pytest.raises(SystemExit, match="needs as many GPUs, and CUDA sees 1"):
        modules[1].main()


def is_free(port: int) -> bool:
    """Whether no server has that port."""
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture
def served(modules, tmp_path, monkeypatch):
    """Puts SERVER in the place of vLLM's command; says what its servers were given, by their position."""
    first = next(port for port in range(20_000, 32_000, 3) if all(map(is_free, range(port, port + 3))))
    script = tmp_path / "vllm.py"

    class Served:
        port = str(first)

        def write(self, after: dict[int, int]) -> None:
            """after: positions of servers that are measured after others."""
            result = {"model_id": "model"} | FIGURES
            ports = {str(first + late): str(first + early) for late, early in after.items()}
            script.write_text(f"FOLDER, AFTER, RESULT = {str(tmp_path)!r}, {ports!r}, {result!r}\n{SERVER}")

        def given(self, position: int) -> dict[str, object]:
            return json.loads((tmp_path / f"{first + position}.json").read_text())

    for module in modules:
        monkeypatch.setattr(module, "VLLM", (sys.executable, str(script)))
    made = Served()
    made.write({})
    return made


def test_int4_has_as_many_layers_as_the_source(modules, served, options):
    arguments = options()
    (arguments.source / "config.json").write_text('{"num_hidden_layers": 4}')
    (arguments.source / "tokenizer.json").write_text("{}")
    row, prefill = modules[1].serve("int4", arguments, int(served.port), ["0"])
    assert row["output_throughput"] == 1.0
    assert (row["concurrency"], row["answer_tokens"], row["request_throughput"]) == (1, 128, 128)
    assert (prefill["concurrency"], prefill["answer_tokens"], prefill["request_throughput"]) == (32, 1, 1)
    given = served.given(0)
    assert given["config"]["num_hidden_layers"] == 4 and given["config"]["quantization_config"]["bits"] == 4
    assert given["words"][-2:] == ["--load-format", "dummy"]


def test_servers_side_by_side(modules, served, options, tmp_path, monkeypatch):
    end_to_end = modules[1]
    monkeypatch.setenv("VLLM_PORT", "1")
    monkeypatch.setenv("PUZZLEMOE_FP8_PREFILL", "1")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: argparse.Namespace(total_memory=1))
    served.write({0: 2})  # which would never end if the third did not have the second's GPUs meanwhile
    weights = ("packed", "packed, prefill in FP8", "bf16")
    arguments = options(weights=weights, tensor_parallel=2, port=int(served.port))
    kept = list(end_to_end.serve_all(arguments, ["4", "5", "6", "7"]))
    twice = [name for name in weights for _ in range(2)]  # with one number of clients, and prefill
    assert [[row["weights"] for row in rows] for rows in kept] == [twice[2:4], twice[2:], twice]
    first, second, third = (served.given(position) for position in range(3))
    assert [each["CUDA_VISIBLE_DEVICES"] for each in (first, second, third)] == ["4,5", "6,7", "6,7"]
    assert [each["PUZZLEMOE_FP8_PREFILL"] for each in (first, second, third)] == [None, "1", None]
    assert len({each["VLLM_CACHE_ROOT"] for each in (first, second, third)}) == 3
    assert {each["VLLM_PORT"] for each in (first, second, third)} == {None}
    assert [each["model"] for each in (first, third)] == [str(tmp_path / "packed"), str(tmp_path / "source")]
    for each in (first, second, third):
        assert each["words"][each["words"].index("--tensor-parallel-size") + 1] == "2"
    assert all(row["tensor_parallel"] == 2 and row["output_throughput"] == 1.0 for row in kept[-1])
