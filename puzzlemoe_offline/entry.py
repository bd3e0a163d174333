"""The console script: the command, or one line that says which extra to install."""

from __future__ import annotations

import gc
import os
import sys
import time

from puzzlemoe_offline.cli.interrupts import exit_at_once
from puzzlemoe_offline.extras import MissingExtra, require


def main() -> None:
    """Runs the `puzzlemoe` command.  Importing what it needs takes seconds, in which Ctrl-C is no traceback either."""
    began = time.perf_counter()
    exit_at_once()
    try:
        require("compress")
    except MissingExtra as error:
        sys.exit(f"error: {error}")
    # Experts' tokens come in tensors of all sizes, between which segments of a fixed size are left with gaps.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    gc.disable()  # half a million objects that imports make, and stay: looking for garbage among them takes a second
    from puzzlemoe_offline.cli.main import main as command

    gc.enable()
    command(began)
