"""The plugin where vLLM, or all but its own few requirements, is not installed."""

from __future__ import annotations

import ast
import importlib.util
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.command import puzzlemoe
from support.without import run

import puzzlemoe_vllm
from puzzlemoe_offline import extras
from puzzlemoe_offline.extras import COMPARE, COMPRESS, MODULES

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.mark.without_vllm
def test_format_and_kernels_work_without_vllm():
    done = run(
        """
import torch, puzzlemoe_vllm, puzzlemoe_vllm.ops
from puzzlemoe_vllm.format import codes, layout, shards
assert "vllm" not in sys.modules
assert not torch.cuda.is_initialized()
words = torch.tensor([[0x3F80 - (112 << 7) | 0x3000]], dtype=torch.int32).short()
print(float(codes.get_code("mask16").decode(words, 1)), layout.parse_config({"clusters": {"0": [0, 0]}}).format_version)
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1.0", "2"]


def modules(listed: list[str]) -> set[str]:
    """Modules of requirements; here a package's module has its name."""
    return {name.split(">=")[0] for name in listed if not name.startswith("puzzlemoe-vllm")}


@pytest.mark.without_vllm
def test_the_command_asks_for_the_modules_of_its_extras():
    declared = PROJECT["optional-dependencies"]
    assert {extra: modules(declared[extra]) for extra in MODULES} == {name: set(own) for name, own in MODULES.items()}
    assert declared["compare"][0] == "puzzlemoe-vllm[compress]" and declared["test"][0] == "puzzlemoe-vllm[compare]"


@pytest.mark.without_vllm
def test_all_but_what_vllm_calls_works_with_the_base_requirements():
    assert modules(PROJECT["dependencies"]) == {"torch", "safetensors", "pydantic"}
    done = run(
        """
import importlib, pkgutil, torch
import puzzlemoe_vllm
names = [module.name for module in pkgutil.walk_packages(puzzlemoe_vllm.__path__, "puzzlemoe_vllm.")]
# The CUDA library, where it was built, is no Python module.
names = [name for name in names if not name.endswith("libpuzzlemoe_cuda")]
lacking = {}
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        lacking[name.removeprefix("puzzlemoe_vllm.")] = error.name
print(len(names), lacking)
""",
        {"vllm", *COMPRESS, *COMPARE},
    )
    assert done.returncode == 0, done.stderr
    count, printed = done.stdout.split(maxsplit=1)
    lacking = ast.literal_eval(printed)
    assert int(count) > 20
    # vLLM requires transformers, which requires huggingface_hub.
    assert set(lacking.values()) <= {"vllm", "transformers", "huggingface_hub"}, lacking
    assert not {"config", "method"} - lacking.keys()
    assert len(lacking) <= 6, lacking


def test_serving_needs_nothing_of_the_offline_tool():
    """vLLM brings some packages of the extras itself; those that it does not bring are not missed.

    sklearn: transformers imports it where it is, and it imports scipy.
    """
    done = run(
        "import puzzlemoe_vllm\npuzzlemoe_vllm.register()\nimport puzzlemoe_vllm.method, puzzlemoe_vllm.served_files",
        {"puzzlemoe_offline", "accelerate", "datasets", "matplotlib", "pyarrow", "scipy", "sklearn"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.without_vllm
@pytest.mark.parametrize("missing", [{"datasets"}, {"typer", "rich"}, set(COMPRESS)])
def test_the_command_without_its_extra_is_one_line(missing):
    done = run("from puzzlemoe_offline.entry import main\nmain()", missing)
    assert done.returncode == 1 and not done.stdout
    names = ", ".join(sorted(missing))
    assert done.stderr == f'error: {names} not installed here: pip install "puzzlemoe-vllm[compress]"\n'


@pytest.mark.without_vllm
@pytest.mark.parametrize("command", [["compare", "SRC", "--text", __file__], ["inspect", "SRC", "--plots", "figures"]])
def test_comparing_without_its_extra_is_one_line(command, monkeypatch, capsys):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "scipy" else importlib.util.find_spec(name))
    assert puzzlemoe(*command) == 1
    assert capsys.readouterr().err == 'error: scipy not installed here: pip install "puzzlemoe-vllm[compare]"\n'


@pytest.mark.without_vllm
def test_both_packages_say_that_they_are_typed():
    for package in ("puzzlemoe_vllm", "puzzlemoe_offline"):
        spec = importlib.util.find_spec(package)
        assert spec and spec.origin and Path(spec.origin).with_name("py.typed").exists()


@pytest.mark.without_vllm
def test_registering_without_vllm_names_what_is_missing():
    done = run("import puzzlemoe_vllm\npuzzlemoe_vllm.register()")
    assert done.returncode != 0
    assert "No module named 'vllm'" in done.stderr


@pytest.mark.without_vllm
@pytest.mark.parametrize(
    ("version", "warns"),
    [("0.26.0", 0), ("0.32.0+cpu", 0), ("0.33.1", 0), ("0.25.1", 1), ("0.34.0rc1", 1), ("1.0", 1), ("dev", 1)],
)
def test_other_releases_of_vllm_are_warned_of_once(monkeypatch, caplog, version, warns):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
    monkeypatch.setitem(sys.modules, "puzzlemoe_vllm.config", SimpleNamespace())
    puzzlemoe_vllm._warn_of_untested.cache_clear()
    puzzlemoe_vllm.register()
    puzzlemoe_vllm.register()
    assert len(caplog.records) == warns
    assert all(f"vLLM {version} is not among" in text and "0.26 to 0.33" in text for text in caplog.messages)
