"""Seconds of a command's stages, one after the other without a gap."""

from __future__ import annotations

import time


class Stages:
    """A clock that runs on from stage to stage."""

    def __init__(self, began: float | None = None):
        """began: `time.perf_counter()` of when the command began, if not now."""
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter() if began is None else began

    def lap(self) -> float:
        """Seconds since the last lap, or since the beginning."""
        last, self._last = self._last, time.perf_counter()
        return self._last - last

    def end(self, stage: str) -> None:
        """The stage took what has passed since the last lap."""
        self.seconds[stage] = self.lap()
