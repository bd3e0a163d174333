"""The plugin against the Python of other vLLM releases than the installed one: oldest, newest, one between."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

RELEASES = ("0.26.0", "0.29.0", "0.33.0")
HERE = Path(__file__).parent
CACHE = Path(os.environ.get("PUZZLEMOE_WHEEL_CACHE") or Path.home() / ".cache" / "puzzlemoe-tests")


def contract(path: Path) -> None:
    """Runs contract.py with the vLLM that lies in `path`."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "contract.py"]
    search = os.pathsep.join([str(path), str(HERE.parents[1]), str(HERE.parent)])
    environment = {**os.environ, "PYTHONPATH": search, "VLLM_UNDER_TEST": str(path)}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def python_of(version: str) -> Path:
    """A folder with the *.py files of a release's wheel, fetched once; skips the test when it cannot be had."""
    folder = CACHE / f"vllm-{version}"
    if not folder.exists():
        wheels = CACHE / "wheels"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(wheels), f"vllm=={version}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            pytest.skip(f"fetching the wheel of vllm {version} took more than five minutes")
        if done.returncode:
            pytest.skip(f"the wheel of vllm {version} cannot be had: {done.stderr.strip().splitlines()[-1]}")
        (wheel,) = wheels.glob(f"vllm-{version}-*.whl")
        partial = folder.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial, [name for name in archive.namelist() if _is_python(name)])
        partial.rename(folder)
        wheel.unlink()
    return folder


def _is_python(name: str) -> bool:
    return name.endswith(".py") or ".dist-info/" in name


def installed() -> Path:
    """The folder that the installed vLLM lies in."""
    (package,) = importlib.util.find_spec("vllm").submodule_search_locations
    return Path(package).parent


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[None]]]:
    """The contract by release.  Importing vLLM takes most of its time, on one core: two run at once."""
    with ThreadPoolExecutor(2) as pool:
        others = {version: pool.submit(lambda version=version: contract(python_of(version))) for version in RELEASES}
        yield {"installed": pool.submit(lambda: contract(installed())), **others}


@pytest.mark.parametrize("release", ["installed", *RELEASES])
def test_release(release, runs):
    runs[release].result()
