"""Packed and unpacked tiny models, and vLLM processes to run them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engine import Engine
from support.packed_models import Models, compress_and_unpack
from typer.testing import CliRunner

from puzzlemoe_offline.cli.main import app


def _unusable() -> str | None:
    """Why vLLM cannot run here."""
    # This folder is called vllm as well; without the package it would be found as a namespace.
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return "vllm is not installed"
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        return "needs vLLM's CPU build, or a GPU"
    return None


UNUSABLE = _unusable()
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if UNUSABLE:
        for item in items:
            if item.path.is_relative_to(HERE) and "without_vllm" not in item.keywords:
                item.add_marker(pytest.mark.skip(reason=UNUSABLE))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "without_vllm: runs where vLLM is not installed, too")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Models]:
    """models(family, sparsity="0.5", code="mask16", clusters=None, **overrides), made once per session."""
    made: dict[str, Models] = {}

    def make(
        family: str, sparsity: str = "0.5", code: str = "mask16", clusters: int | None = None, **overrides: Any
    ) -> Models:
        key = f"{family}-{sparsity}-{code}-{clusters}-{sorted(overrides.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            made[key] = compress_and_unpack(folder, family, sparsity, code, clusters, **overrides)
        return made[key]

    return make


@pytest.fixture(scope="session")
def packed_example(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained example, packed."""
    out = tmp_path_factory.mktemp("example") / "packed"
    options = ["--calibration", str(example / "calibration.txt"), "--samples", "16", "--sequence-length", "128"]
    command = ["compress", str(example / "model"), str(out), *options, "--code", "angle16", "--device", "cpu"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, (done.output, done.exception)
    return out


def _engine(folder: Path, **environment: str) -> Iterator[Engine]:
    engine = Engine(folder / "log", **environment)
    yield engine
    engine.stop()


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One process for all eager runs on one device."""
    yield from _engine(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="session")
def verifying_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One process that compares whole digests."""
    yield from _engine(tmp_path_factory.mktemp("verifying-engine"), PUZZLEMOE_VERIFY="1")


@pytest.fixture(scope="session")
def compiling_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One process for all compiled runs; vLLM cannot compile some models that the process ran eagerly before."""
    yield from _engine(tmp_path_factory.mktemp("compiling-engine"))


@pytest.fixture(scope="session")
def parallel_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One process whose models may have two ranks."""
    yield from _engine(tmp_path_factory.mktemp("parallel-engine"), VLLM_CPU_OMP_THREADS_BIND="0|1")
