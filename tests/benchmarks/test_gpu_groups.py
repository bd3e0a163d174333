"""Work side by side: no GPU is given to two pieces at once, and pieces begin in their order."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest
from support.scripts import load_script


@pytest.fixture(scope="module")
def groups():
    return load_script("benchmarks/gpu_groups.py")


@pytest.mark.parametrize(
    ("named", "expected"), [(None, ["0", "1"]), ("", ["0", "1"]), ("6,3", ["6", "3"]), ("6,3,9", ["6", "3"])]
)
def test_visible_gpus(groups, monkeypatch, named, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert groups.visible_gpus() == expected


def test_no_gpu_is_given_twice_and_all_are_used(groups):
    held, most, lock = set(), 0, threading.Lock()

    def run(seconds, gpus):
        nonlocal most
        with lock:
            assert not held & set(gpus) and len(set(gpus)) == len(gpus)
            held.update(gpus)
            most = max(most, len(held))
        time.sleep(seconds)
        with lock:
            held.difference_update(gpus)
        return len(gpus)

    sizes = [1, 1, 2, 4, 2, 1, 3, 1]
    work = [groups.Work(size, partial(run, 0.02 * (3 - position % 3))) for position, size in enumerate(sizes)]
    assert sorted(groups.side_by_side(work, list("abcd"))) == list(enumerate(sizes))
    assert most == 4 and not held


def test_work_begins_in_its_order_and_comes_as_it_ends(groups):
    began = []

    def run(name, seconds, gpus):
        began.append((name, gpus))
        time.sleep(seconds)

    work = [groups.Work(1, partial(run, "long", 0.3)), groups.Work(1, partial(run, "short", 0.1))]
    work += [groups.Work(2, partial(run, "both", 0)), groups.Work(1, partial(run, "last", 0))]
    assert [position for position, _ in groups.side_by_side(work, ["4", "7"])] == [1, 0, 2, 3]
    assert began == [("long", ["4"]), ("short", ["7"]), ("both", ["4", "7"]), ("last", ["4"])]


def test_what_cannot_fit_is_refused_before_anything_begins(groups):
    began = []
    work = [groups.Work(1, began.append), groups.Work(2, began.append)]
    with pytest.raises(ValueError, match="2 GPUs are needed, and CUDA sees 1"):
        next(groups.side_by_side(work, ["0"]))
    assert not began


def test_what_a_piece_raises_is_raised(groups):
    def fail(gpus):
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        list(groups.side_by_side([groups.Work(1, fail)], ["0"]))


def test_environment_has_its_gpus_and_no_port(groups, monkeypatch):
    monkeypatch.setenv("VLLM_PORT", "1")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    environment = groups.environment_of(["3", "5"])
    assert environment["CUDA_VISIBLE_DEVICES"] == "3,5" and environment["NCCL_NVLS_ENABLE"] == "0"
    assert "VLLM_PORT" not in environment
