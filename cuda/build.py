#!/usr/bin/env python3
"""Builds the CUDA library with nvcc: no torch, no Python headers, the CUDA runtime linked in.

cuda/build.py OUTPUT.so [--arch 90 --arch 80 ...] [--jobs N]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
ARCHES = ("80", "86", "89", "90")
HOPPER_ONLY = {"gemm_hopper.cu"}
"""Sources that use instructions of sm_90a, which has no forward compatibility: built for it alone."""


def find_nvcc() -> str:
    """Path of nvcc: $NVCC, $CUDA_HOME/bin or the PATH.  Raises FileNotFoundError saying what to do."""
    candidates = [os.environ.get("NVCC")]
    candidates += [shutil.which("nvcc", path=str(Path(home) / "bin")) for home in [os.environ.get("CUDA_HOME")] if home]
    candidates += [shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]
    for candidate in candidates:
        if candidate:
            return candidate
    raise FileNotFoundError(
        "nvcc was not found: put the CUDA toolkit (12.8 or later) on the PATH, or set CUDA_HOME or NVCC"
    )


def targets(source: str, arches: Sequence[str]) -> list[str]:
    """nvcc's -gencode flags of one source: machine code for every architecture, and PTX of the last for later ones."""
    if source in HOPPER_ONLY:
        return ["-gencode=arch=compute_90a,code=sm_90a"]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in arches]
    return [*flags, f"-gencode=arch=compute_{arches[-1]},code=compute_{arches[-1]}"]


def build_library(output: Path, arches: Sequence[str] = ARCHES, jobs: int | None = None) -> None:
    """Compiles every source and links `output`.

    Raises FileNotFoundError without nvcc and subprocess.CalledProcessError when it fails; its messages go to stderr.
    """
    nvcc = find_nvcc()
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    with tempfile.TemporaryDirectory() as folder:

        def compile_source(source: Path) -> Path:
            target = Path(folder, source.stem + ".o")
            command = [nvcc, *flags, *targets(source.name, arches), "-c", str(source), "-o", str(target)]
            subprocess.run(command, check=True, stdout=sys.stderr)
            return target

        with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
            objects = list(pool.map(compile_source, sorted(SOURCES.glob("*.cu"))))
        partial = Path(folder, "library.so")
        link = [nvcc, "-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", "-o", str(partial)]
        subprocess.run([*link, *map(str, objects)], check=True, stdout=sys.stderr)
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(partial, output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--arch", action="append", help=f"such as 90; default {' '.join(ARCHES)}")
    parser.add_argument("--jobs", type=int)
    arguments = parser.parse_args()
    try:
        build_library(arguments.output, arguments.arch or ARCHES, arguments.jobs)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
