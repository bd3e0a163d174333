"""The compiler with which CUDA sources are built for the host, and those sources."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

COMPILER = shutil.which("g++") or shutil.which("clang++")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

CUDA = Path(__file__).parents[2] / "cuda"
EMULATED = ("cuda_bf16.h", "ptx.cuh", "launch.cuh", "sm90/ptx_sm90.cuh", "sm90/wgmma.cuh")
"""Headers that tests/cuda/host_gpu.h stands in for."""


def emulated_sources(folder: Path) -> Path:
    """A copy of cuda/ that asks host_gpu.h for its instructions."""
    sources = folder / "cuda"
    shutil.copytree(CUDA, sources)
    for name in EMULATED:
        (sources / name).write_text('#pragma once\n#include "host_gpu.h"\n')
    return sources


def emulated_library(
    source: Path, folder: Path, changes: Iterable[tuple[str, str, str]] = (), macros: Iterable[str] = ()
) -> ctypes.CDLL:
    """A source of tests/cuda with its headers of cuda/ as a library, for a host; changes: of a header, what is replaced
    by what; macros: NAME=VALUE."""
    sources = emulated_sources(folder)
    for name, right, wrong in changes:
        change(sources / name, right, wrong)
    library = folder / f"{source.stem}.so"
    command = [COMPILER, "-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-fPIC", "-shared"]
    command += [*(f"-D{macro}" for macro in macros), f"-I{sources}", f"-I{source.parent}"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True, timeout=600)
    return ctypes.CDLL(str(library))


def change(source: Path, right: str, wrong: str) -> None:
    """Replaces what a source has in one place."""
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
