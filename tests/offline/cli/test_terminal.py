"""What commands print where no terminal is: in a log of a batch system, through a pipe."""

from __future__ import annotations

import subprocess
import sys

import pytest

from puzzlemoe_offline.cli import terminal


@pytest.mark.parametrize("seconds, layers", [(1, []), (20, [2, 4]), (40, [1, 2, 3, 4, 5])])
def test_a_line_now_and_then_says_how_far_it_is(seconds, layers, monkeypatch, capsys):
    """And in the end, however soon that comes."""
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with terminal.layer_progress("compressing", 5) as advance:
        for layer in range(5):
            now += seconds
            advance(layer)
            said = capsys.readouterr().err.splitlines()
            assert [f"{layer + 1}/5" in line for line in said] == [True] * (layer + 1 in layers)
    assert "compressing" in (last := capsys.readouterr().err) and "5/5" in last


@pytest.mark.parametrize("columns, width", [({}, 120), ({"COLUMNS": "91"}, 91)])
def test_lines_of_a_log_are_wide(columns, width):
    code = "from puzzlemoe_offline.cli.terminal import console, errors; console.rule(); errors.rule()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)} | columns,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [len(done.stdout.strip()), len(done.stderr.strip())] == [width, width]
