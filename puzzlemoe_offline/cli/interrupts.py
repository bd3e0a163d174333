"""Ctrl-C and SIGTERM: one line, and the exit status that a shell gives a command that was ended so.

Imports nothing but the standard library: it is at work before anything else is imported.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)

RESUMABLE = ("compress", "baseline", "unpack")
"""Commands that have --resume."""

RESUME = "--resume goes on from what was saved last"


class Interrupted(BaseException):
    """A signal that ends the command.  No KeyboardInterrupt: Click answers that with a word of its own."""

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.status = 128 + number


def can_resume() -> bool:
    """Whether the command that was given has --resume."""
    return sys.argv[1:2] != [] and sys.argv[1] in RESUMABLE and "--dry-run" not in sys.argv


def last_line() -> str:
    """What is said of an interruption."""
    return f"interrupted; the same command with {RESUME}" if can_resume() else "interrupted"


def exit_at_once() -> None:
    """From here on a signal ends the process, with nothing to be put in order: for while modules are imported."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        os.write(2, f"error: {last_line()}\n".encode())
        os._exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, end)


@contextmanager
def raising() -> Iterator[None]:
    """A signal raises Interrupted, so that locks, threads and temporary folders are put in order; a second one ends the
    process where it is, which no folder is harmed by."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        raise Interrupted(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
