"""Runs killed at random times and inside every step that touches the disk, each resumed to the same bytes.

    PYTHONPATH=.:tests OMP_NUM_THREADS=1 python tests/fuzz/kills.py [--kills N] [--seed N] [--finishing]

A killed run is a fork of this process, which has imported everything: one takes a fraction of a second.  Prints a
summary; ends with status 1 at the first folder that differs from an uninterrupted run's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.models import build
from support.runs import SENTENCE

from puzzlemoe_offline.cli.main import main
from puzzlemoe_offline.run.output import ModelFolder

STEPS = ("fsync", "replace", "unlink", "rmdir", "mkdir")
"""Functions of `os` by which a run changes the disk, but for writes into files that have no name of their own yet."""

REPORT = "puzzlemoe_report.json"


def kill_at(step: int, finishing: bool) -> None:
    """Has this process end by SIGKILL just before its nth step, counted from its first or from the last shard on."""
    taken, armed = 0, not finishing

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*words: Any, **options: Any) -> Any:
            nonlocal taken
            if armed and taken == step:
                os.kill(os.getpid(), signal.SIGKILL)
            taken += armed
            return function(*words, **options)

        return counted

    for name in STEPS:
        setattr(os, name, counting(getattr(os, name)))
    finish = ModelFolder.finish

    def finishing_now(*words: Any) -> None:
        nonlocal armed
        armed = True
        finish(*words)

    ModelFolder.finish = finishing_now  # type: ignore[method-assign]


def start(words: list[str], prepare: Callable[[], object] = lambda: None) -> int:
    """Runs the tool in a fork; its process id."""
    process = os.fork()
    if process:
        return process
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.argv = ["puzzlemoe", *words]
    prepare()
    try:
        main()
    except SystemExit as stopped:
        os._exit(int(stopped.code or 0))
    finally:
        os._exit(70)


def wait(process: int) -> int:
    """The exit status, or minus the signal that ended the process."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a folder, byte for byte; of the report all but the times and the number of devices."""
    files: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }
    report = json.loads(files[REPORT])
    for part in (report, *report["layers"]):
        del part["seconds"]
    del report["devices"]
    return files | {REPORT: report}


class Trials:
    """Runs of one command line, compared with one that nothing interrupted."""

    def __init__(self, folder: Path, generator: random.Random):
        self.folder, self.random = folder, generator
        source = build("mixtral", folder / "source", num_hidden_layers=3)
        text = folder / "text.txt"
        text.write_text(SENTENCE * 60)
        sizes = ["--samples", "8", "--sequence-length", "64", "--device", "cpu"]  # forks share no GPU
        self.words = ["compress", str(source), "--calibration", str(text), "--recipe", "paper", *sizes]
        self.kills = self.again = self.finished = self.resumed = 0
        whole = folder / "whole"
        assert wait(start([*self.words, str(whole)])) == 0
        began = time.perf_counter()
        assert wait(start([*self.words, str(folder / "timed")])) == 0
        self.seconds = time.perf_counter() - began
        self.expected = contents(whole)

    def check(self, out: Path, why: str) -> None:
        """Resumes, twice: the second time there is nothing left to do.  Then compares and removes the folder."""
        for _ in range(2):
            status = wait(start([*self.words, str(out), "--resume"]))
            if status != 0:
                sys.exit(f"{why}: --resume ended with status {status}; see {out}")
        found = contents(out)
        if found != self.expected:
            names = {name for name in found.keys() | self.expected if found.get(name) != self.expected.get(name)}
            sys.exit(f"{why}: {', '.join(sorted(names))} differ; see {out}")
        shutil.rmtree(out)
        self.resumed += 1

    def at_random_times(self, kills: int) -> None:
        """That many kills; the resumed run is killed again with probability 1/3."""
        while self.kills < kills:
            out = self.folder / f"killed-{self.kills}"
            first = True
            while first or (self.kills < kills and self.random.random() < 1 / 3):
                process = start([*self.words, str(out), "--resume"])
                time.sleep(self.random.uniform(0, 1.05 * self.seconds))
                os.kill(process, signal.SIGKILL)
                if wait(process) == 0:
                    self.finished += 1
                else:
                    self.kills += 1
                    self.again += not first
                first = False
            self.check(out, f"killed at random, {self.kills}")

    def at_steps(self, finishing: bool) -> int:
        """A kill before every step of a run, or of finishing it; how many there were."""
        step, begun = 0, self.folder / "begun"
        while True:
            out = self.folder / f"step-{step}"
            if begun.exists():
                shutil.copytree(begun, out)
            prepare = partial(kill_at, step, finishing)
            if (status := wait(start([*self.words, str(out), "--resume"], prepare))) == 0:
                return step
            if status != -signal.SIGKILL:
                sys.exit(f"step {step}: status {status}")
            if finishing and step == 0:
                shutil.copytree(out, begun)  # all layers are there: later steps need not make them again
            self.check(out, f"killed before step {step}")
            step += 1


def trials() -> None:
    """As the options say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--finishing", action="store_true", help="only the steps after the last shard")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork has none of the threads that its parent had
    with tempfile.TemporaryDirectory(prefix="puzzlemoe-kills-") as folder:
        runs = Trials(Path(folder), random.Random(options.seed))
        runs.at_random_times(options.kills)
        print(
            f"{runs.kills} kills at random times of runs of {runs.seconds:.2f} s, {runs.again} of resumed runs "
            f"({runs.finished} runs ended before their kill): {runs.resumed} folders resumed to the same bytes",
            flush=True,
        )
        steps = runs.at_steps(options.finishing)
        print(f"{steps} kills, one before each step of {'finishing' if options.finishing else 'a run'}: the same bytes")


if __name__ == "__main__":
    trials()
