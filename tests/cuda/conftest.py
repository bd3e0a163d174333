"""The CUDA library, built once for the tests of this folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock
from support.scripts import load_script

from puzzlemoe_vllm.backends import cuda


@pytest.fixture(scope="session")
def build() -> ModuleType:
    return load_script("cuda/build.py")


@pytest.fixture(scope="session")
def check(build) -> ModuleType:
    """The module that `build` has."""
    return build.check


@dataclass(frozen=True)
class Built:
    build: ModuleType
    nvcc: str
    objects: dict[Path, Path]
    path: Path
    messages: str
    """What nvcc and ptxas, asked for its resources, said of all sources."""


@pytest.fixture(scope="session")
def cuda_library(build, tmp_path_factory) -> Built:
    """The library for compute capability 9.0, its objects and what the compiler said."""
    try:
        nvcc = build.find_nvcc()
    except FileNotFoundError:
        pytest.skip("nvcc is not installed")
    # Processes that share the tests share it too.
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    folder, kept = shared / "cuda-library", shared / "cuda-library.json"
    path = folder / "libpuzzlemoe_cuda.so"
    with FileLock(shared / "cuda-library.lock"):
        if not kept.exists():
            folder.mkdir()
            objects, messages = build.compile_all(nvcc, folder, ["90"], flags=["-Xptxas=-v"])
            build.link(nvcc, objects, path)
            names = {str(source): str(target) for source, target in objects.items()}
            kept.write_text(json.dumps([names, messages]))
    names, messages = json.loads(kept.read_text())
    return Built(build, nvcc, {Path(source): Path(target) for source, target in names.items()}, path, messages)


@pytest.fixture
def loaded(monkeypatch) -> Iterator[Callable[[Path], None]]:
    """Makes the backend load a library that is not the installed one, for this test."""
    caches = (cuda.load_library, cuda.kernel_names, cuda.served_capability)

    def load(path: Path) -> None:
        monkeypatch.setenv(cuda.LIBRARY_VARIABLE, str(path))
        for cache in caches:
            cache.cache_clear()

    yield load
    for cache in caches:
        cache.cache_clear()
