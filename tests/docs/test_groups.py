"""The report of which groups of tests ran, and the failure where a group was skipped that could run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.groups import GROUPS, Candidate

CONFTEST = """
from support.groups import Group, GroupReport
def pytest_configure(config):
    groups = (
        Group("with nvcc", lambda test: "library" in test.fixtures, lambda: {nvcc!r}),
        Group("of a module", lambda test: test.path.endswith("test_module.py"), lambda: {module!r}),
        Group("others", lambda test: True),
    )
    config.pluginmanager.register(GroupReport(groups))
"""
TESTS = """
import pytest
@pytest.fixture
def library():
    pytest.skip("nvcc is not installed")
def test_library(library): pass
def test_other(): pass
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
"""
MODULE = "import pytest\npytest.importorskip('no_such_module')\ndef test(): pass\n"


def run(folder: Path, **missing: str | None) -> tuple[int, list[str]]:
    """Exit status, and the lines of the report."""
    (folder / "conftest.py").write_text(CONFTEST.format(**({"nvcc": "nvcc", "module": "a module"} | missing)))
    (folder / "test_some.py").write_text(TESTS)
    (folder / "test_module.py").write_text(MODULE)
    search = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([search, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", str(folder), str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)
    assert "groups of tests" in done.stdout, done.stdout + done.stderr
    lines = done.stdout.split("groups of tests")[1].splitlines()[1:]
    return done.returncode, [line for line in lines if ":" in line]


def test_what_cannot_run_is_told(tmp_path):
    assert run(tmp_path) == (
        0,
        [
            "with nvcc: 0 ran, 1 skipped for want of nvcc",
            "of a module: 0 ran, 1 skipped for want of a module",
            "others: 1 ran, 1 skipped",
        ],
    )


@pytest.mark.parametrize("there", ["nvcc", "module"])
def test_a_group_that_could_run_and_was_skipped_fails(tmp_path, there):
    status, lines = run(tmp_path, **{there: None})
    assert status == 1
    failed = [line for line in lines if "FAILED" in line]
    reason = {"nvcc": "nvcc is not installed", "module": "could not import 'no_such_module'"}[there]
    assert len(failed) == 1 and "which this machine can run" in failed[0] and reason in failed[0]


@pytest.mark.parametrize(
    ("test", "name"),
    [
        (Candidate("/tests/cuda/test_build.py", fixtures=frozenset({"cuda_library"})), "CUDA library"),
        (Candidate("/tests/backends/test_cuda_kernels.py"), "CUDA kernels"),
        (Candidate("/tests/offline/words/test_trellis_kernels.py"), "CUDA kernels"),
        (Candidate("/tests/backends/test_cuda_fp8.py"), "CUDA kernels in e4m3"),
        (Candidate("/tests/plugin/test_vllm_releases.py", "test_release[0.26.0]"), "other vLLM releases"),
        (Candidate("/tests/plugin/test_vllm_releases.py", "test_release[installed]"), "vLLM plugin"),
        (Candidate("/tests/plugin/test_op.py", marks=frozenset({"without_vllm"})), "needing nothing"),
        (Candidate("/tests/plugin/test_same_tokens.py"), "vLLM plugin"),
        (Candidate("/tests/plugin/test_server.py"), "vLLM server, lm-eval"),
        (Candidate("/tests/offline/test_x.py", fixtures=frozenset({"data"})), "a trained model"),
        (Candidate("/tests/backends/test_triton.py", reasons=frozenset({"needs a GPU"})), "on a GPU"),
        (Candidate("/tests/format/test_layout.py"), "needing nothing"),
    ],
)
def test_groups_of_this_project(test, name):
    assert next(group.name for group in GROUPS if group.holds(test)) == name


def test_reasons_that_make_a_group_are_those_of_the_tests():
    from support.groups import GPU_REASONS

    text = "".join(
        path.read_text() for path in (Path(__file__).resolve().parents[1]).rglob("*.py") if path.name != "groups.py"
    )
    assert all(f'reason="{reason}"' in text for reason in GPU_REASONS)
