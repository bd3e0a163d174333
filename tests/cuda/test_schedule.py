"""The schedule of the sm90 kernels, which is plain arithmetic: checked on the host for launches of all sizes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from support.host_compiler import COMPILER, CUDA, change, needs_compiler

SOURCE = Path(__file__).with_name("schedule.cpp")
SCHEDULE = CUDA / "sm90" / "schedule.cuh"

pytestmark = needs_compiler


def checked(source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    program = folder / "schedule"
    command = [COMPILER, "-std=c++17", "-O2", "-Wall", "-Werror", str(source), "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    return subprocess.run([program], capture_output=True, text=True, timeout=300)


def test_every_stage_is_done_once_and_no_block_waits_for_a_later_one(tmp_path):
    done = checked(SOURCE, tmp_path)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split()[0]) > 100_000


@pytest.mark.parametrize(
    "right, wrong, promise",
    [
        ("(piece.item + 1) * stages - 1", "piece.item * stages", "the last dealer has the item's end"),
        ("grid.blocks() - 1 - grid.block()", "grid.block()", "a block's dealer is its own"),
        ("dealt_end_ < dealt_ ? 0 : end % stages_", "end % stages_", "dealt shares are even"),
        ("turn_(launch.cut + first_item(grid))", "turn_(launch.cut + grid.block() / 2)", "every stage of every item"),
        ("least(dealer, dealers) * (cut * stages) / dealers",
         "least(dealer * (cut * stages / dealers + 1), cut * stages)", "all blocks have as many stages"),
    ],
)  # fmt: skip
def test_a_mistake_in_it_would_be_found(right, wrong, promise, tmp_path):
    folder = tmp_path / "cuda" / "sm90"
    folder.mkdir(parents=True)
    shutil.copy(SCHEDULE, folder)
    change(folder / SCHEDULE.name, right, wrong)
    shutil.copy(SCHEDULE.parents[1] / "host_device.h", folder.parent)
    source = tmp_path / "tests" / "cuda" / SOURCE.name
    source.parent.mkdir(parents=True)
    shutil.copy(SOURCE, source)
    done = checked(source, tmp_path)
    assert done.returncode == 1 and promise in done.stdout
