#!/usr/bin/env python3
"""Builds the CUDA library with nvcc: no torch, no Python headers, the CUDA runtime linked in.

cuda/build.py OUTPUT.so [--arch 90 --arch 80 ...] [--jobs N]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

SOURCES = Path(__file__).resolve().parent
ARCHES = ("80", "86", "89", "90", "100", "120")
SM90 = SOURCES / "sm90"
"""Sources that use instructions of sm_90a, which has no forward compatibility: built for it alone."""

FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden")
TRUSTED = (13, 3)
"""The first CUDA release whose ptxas is not known to reuse a wgmma's registers too early."""


def _check() -> ModuleType:
    """The module cuda/check.py: this folder is no package."""
    spec = importlib.util.spec_from_file_location("puzzlemoe_cuda_check", SOURCES / "check.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


check = _check()


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


def nvcc_release(nvcc: str) -> tuple[int, int]:
    """The CUDA release of an nvcc, such as (13, 0); (0, 0) where it does not say."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def sources() -> list[Path]:
    """Every file that nvcc compiles."""
    return sorted(SOURCES.rglob("*.cu"))


def targets(source: Path, arches: Sequence[str]) -> list[str]:
    """nvcc's -gencode flags of one source: machine code for every architecture; PTX of the last for later ones, and of
    90 for those between, such as 110."""
    if source.parent == SM90:
        return ["-gencode=arch=compute_90a,code=sm_90a"]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in arches]
    ptx = [arch for arch in arches if arch in ("90", arches[-1])]
    return [*flags, *(f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ptx)]


def compile_source(nvcc: str, source: Path, target: Path, arches: Sequence[str], flags: Sequence[str] = ()) -> str:
    """Compiles one source and returns what nvcc said.  Raises subprocess.CalledProcessError when it fails."""
    # One thread an architecture: the longest source is compiled for all of them.
    command = [nvcc, *FLAGS, *flags, f"--threads={len(arches)}", *targets(source, arches)]
    command += ["-c", str(source), "-o", str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.stderr.write(done.stdout)
        done.check_returncode()
    return done.stdout


def compile_all(
    nvcc: str, folder: Path, arches: Sequence[str], jobs: int | None = None, flags: Sequence[str] = ()
) -> tuple[dict[Path, Path], str]:
    """Compiles every source into `folder`; returns the object of each and what nvcc said.  Raises
    subprocess.CalledProcessError when it fails."""
    objects = {source: folder / f"{source.stem}.o" for source in sources()}
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        said = pool.map(lambda source: compile_source(nvcc, source, objects[source], arches, flags), objects)
        return objects, "".join(said)


def link(nvcc: str, objects: dict[Path, Path], output: Path) -> None:
    """Links a library of all objects."""
    command = [nvcc, "-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", "-o", str(output)]
    subprocess.run([*command, *map(str, objects.values())], check=True, stdout=sys.stderr)


def link_without_sm90(nvcc: str, objects: dict[Path, Path], output: Path, arches: Sequence[str]) -> None:
    """Links a library without the kernels of sm90/, whose other kernels serve compute capability 9.0 too."""
    registry = SOURCES / "kernels.cu"
    target = output.with_name("kernels_without_sm90.o")
    compile_source(nvcc, registry, target, arches, ["-DPM_WITHOUT_SM90"])
    kept = {source: target for source, target in objects.items() if source.parent != SM90}
    link(nvcc, kept | {registry: target}, output)


def distrust(nvcc: str, library: Path) -> str | None:
    """Why the wgmma kernels of a linked library must not be used, or None when they may.

    ptxas chooses registers, and before CUDA 13.3 it is known to write some while a wgmma may still read them: products
    are then wrong, now and then.  So the machine code itself is read.  Where nothing can read it, such a ptxas is not
    believed: kernels that are left out cost time, wrong products would not even be noticed.
    """
    release = nvcc_release(nvcc)
    try:
        early = check.early_writes(check.find_cuobjdump(nvcc), library)
    except check.Unreadable as reason:
        if release >= TRUSTED:
            print(f"puzzlemoe: the machine code was not checked: {reason}", file=sys.stderr)
            return None
        return f"nvcc {release[0]}.{release[1]} may reuse wgmma's registers too early, and {reason}"
    if not early:
        return None
    return f"nvcc {release[0]}.{release[1]} reuses wgmma's registers too early in {len(early)} of its kernels"


def build_library(output: Path, arches: Sequence[str] = ARCHES, jobs: int | None = None) -> None:
    """Compiles every source and links `output`; leaves out the kernels of sm90/ where their code is not to be trusted,
    and says so on stderr.

    Raises FileNotFoundError without nvcc and subprocess.CalledProcessError when it fails; its messages go to stderr.
    """
    nvcc = find_nvcc()
    with tempfile.TemporaryDirectory() as folder:
        objects, messages = compile_all(nvcc, Path(folder), arches, jobs)
        sys.stderr.write(messages)
        library = Path(folder, "library.so")
        link(nvcc, objects, library)
        if reason := distrust(nvcc, library):
            print(
                f"puzzlemoe: {reason}: the library is built without the sm90 kernels, and slower on Hopper; "
                f"CUDA {TRUSTED[0]}.{TRUSTED[1]} or later builds them",
                file=sys.stderr,
            )
            link_without_sm90(nvcc, objects, library, arches)
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(library, output)


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
