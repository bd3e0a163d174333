"""The command line tool run in this process: a new one takes seconds to import what it needs."""

from __future__ import annotations

import sys
from unittest import mock

import pytest

from puzzlemoe_offline.cli.main import main


def puzzlemoe(*words: object) -> int:
    """Runs the tool; returns its exit status."""
    with mock.patch.object(sys, "argv", ["puzzlemoe", *map(str, words)]), pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0
