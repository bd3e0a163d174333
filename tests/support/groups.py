"""Groups of tests by what they need: which ran, which were skipped for want of what.

A run fails when tests were skipped that this machine has all for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Candidate:
    """What is known of a test before it runs.

    path: from the root of the project, with slashes.  fixtures, marks, reasons: its fixtures, its marks' names, the
    reasons of its skipif marks; empty for a module that was skipped as a whole.
    """

    path: str
    name: str = ""
    fixtures: frozenset[str] = frozenset()
    marks: frozenset[str] = frozenset()
    reasons: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Group:
    """Tests that need the same.

    holds: whether a test is one of them.  missing: what they need and this machine lacks, None when it has all.
    """

    name: str
    holds: Callable[[Candidate], bool]
    missing: Callable[[], str | None] = lambda: None


def gpu_missing() -> str | None:
    """By the driver, so that a torch that sees no GPU is found out."""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).stdout
    except FileNotFoundError:
        found = b""
    return None if b"GPU " in found else "an NVIDIA GPU"


def nvcc_missing() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [os.environ.get("NVCC"), shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    return None if any(place and Path(place).exists() for place in places) else "nvcc"


def library_missing() -> str | None:
    if (ROOT / "puzzlemoe_vllm" / "libpuzzlemoe_cuda.so").exists() or os.environ.get("PUZZLEMOE_CUDA_LIBRARY"):
        return gpu_missing()
    return gpu_missing() or nvcc_missing()


def hopper_missing() -> str | None:
    if missing := library_missing():
        return missing
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return None if "9.0" in found else "a GPU of compute capability 9.0"


def vllm_missing() -> str | None:
    spec = importlib.util.find_spec("vllm")
    return None if spec and spec.origin else "vLLM"


def command_missing() -> str | None:
    there = Path(sys.executable).with_name("vllm").exists() and list(importlib.metadata.distributions(name="vllm"))
    return vllm_missing() or (
        None if there and importlib.util.find_spec("lm_eval") else "the commands of vLLM, lm-eval"
    )


def wheels_missing() -> str | None:
    cache = Path(os.environ.get("PUZZLEMOE_WHEEL_CACHE") or Path.home() / ".cache" / "puzzlemoe-tests")
    return vllm_missing() or (None if len(list(cache.glob("vllm-*"))) > 2 else "the wheels of other vLLM releases")


def data_missing() -> str | None:
    return None if os.environ.get("PUZZLEMOE_TEST_DATA") else "PUZZLEMOE_TEST_DATA"


GROUP = "group"
"""The property of a test that names its group."""

GPU_REASONS = {"needs a GPU", "no GPU: test_under_the_interpreter runs it", "vLLM's CPU build has no sleep mode"}

GROUPS = (
    Group("a trained model", lambda test: "data" in test.fixtures, data_missing),
    Group("on a GPU", lambda test: bool(GPU_REASONS & test.reasons), gpu_missing),
    Group(
        "CUDA kernels",
        lambda test: test.path.endswith(("backends/test_cuda_kernels.py", "words/test_trellis_kernels.py")),
        library_missing,
    ),
    Group("CUDA kernels in e4m3", lambda test: test.path.endswith("backends/test_cuda_fp8.py"), hopper_missing),
    Group("CUDA library", lambda test: "cuda_library" in test.fixtures, nvcc_missing),
    Group(
        "other vLLM releases",
        lambda test: test.path.endswith("test_vllm_releases.py") and "[installed]" not in test.name,
        wheels_missing,
    ),
    Group(
        "vLLM server, lm-eval",
        lambda test: test.path.endswith(("plugin/test_server.py", "plugin/test_lm_eval.py")),
        command_missing,
    ),
    Group("vLLM plugin", lambda test: "/plugin/" in test.path and "without_vllm" not in test.marks, vllm_missing),
    Group("needing nothing", lambda test: True),
)
"""A test is of the first that holds it."""


@dataclass
class Count:
    """Tests of a group in one run."""

    ran: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


class GroupReport:
    """The pytest plugin."""

    def __init__(self, groups: tuple[Group, ...] = GROUPS):
        self.groups = groups
        self.counts = {group.name: Count() for group in groups}
        self.missing: dict[str, str | None] = {}

    def _group(self, candidate: Candidate) -> Group:
        return next(group for group in self.groups if group.holds(candidate))

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        reasons = {str(mark.kwargs.get("reason")) for mark in item.iter_markers("skipif")}
        marks = frozenset(mark.name for mark in item.iter_markers())
        fixtures = frozenset(getattr(item, "fixturenames", ()))
        path = item.path.as_posix()
        group = self._group(Candidate(path, item.name, fixtures, marks, frozenset(reasons)))
        # Goes with the test's reports, from another process too.
        item.user_properties.append((GROUP, group.name))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._skipped(self._group(Candidate(f"/{report.nodeid}")), report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = dict(report.user_properties)[GROUP]
        group = next(group for group in self.groups if group.name == name)
        if report.skipped and not hasattr(report, "wasxfail"):
            self._skipped(group, report)
        elif report.when == "call":
            self.counts[group.name].ran += 1

    def _skipped(self, group: Group, report: pytest.CollectReport | pytest.TestReport) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        self.counts[group.name].skipped[str(reason).removeprefix("Skipped: ")] += 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return  # a process that runs part of the tests; the one that started it counts them all
        for group in self.groups:
            self.missing[group.name] = group.missing() if self.counts[group.name].skipped else None
        if session.exitstatus == pytest.ExitCode.OK and any(map(self.wrongly_skipped, self.groups)):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def wrongly_skipped(self, group: Group) -> bool:
        """Whether tests of a group that needs something were skipped although it is there."""
        needs = group is not self.groups[-1]
        return needs and bool(self.counts[group.name].skipped) and self.missing[group.name] is None

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("groups of tests")
        for group in self.groups:
            count = self.counts[group.name]
            skipped = count.skipped.total()
            if not count.ran and not skipped:
                continue
            line = f"{group.name}: {count.ran} ran"
            if skipped:
                line += f", {skipped} skipped"
            if missing := self.missing[group.name]:
                line += f" for want of {missing}"
            if self.wrongly_skipped(group):
                (reason, _), *_ = count.skipped.most_common()
                line += f", which this machine can run: FAILED ({reason})"
            terminalreporter.write_line(line, red=self.wrongly_skipped(group))
