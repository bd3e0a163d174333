"""A run that was ended, damaged, prepared with links or had no room: it goes on to the same bytes, or says why not."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.kills import contents
from support.command import puzzlemoe
from support.models import build
from support.runs import SENTENCE

from puzzlemoe_offline.run import output, runner
from puzzlemoe_offline.run.files import WriteError, write_file
from puzzlemoe_offline.run.output import ModelFolder
from puzzlemoe_offline.run.work import WORK, WorkFolder
from puzzlemoe_vllm.format.shards import ShardRecord, record_shard

LAYERS = 3
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "text.txt").write_text(SENTENCE * 60)
    return build("mixtral", folder / "source", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def packed(source) -> Path:
    """What an uninterrupted run writes."""
    assert puzzlemoe(*compress(source, source.parent / "packed")) == 0
    return source.parent / "packed"


def compress(source: Path, out: Path, *more: object) -> list[object]:
    text = source.parent / "text.txt"
    sizes = ["--samples", "8", "--sequence-length", "64", "--device", "cpu"]
    return ["compress", source, out, "--calibration", text, "--recipe", "paper", *sizes, *more]


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def said(capsys) -> str:
    """The one line that was said of what went wrong."""
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert line == lines[-1]
    return line


def stop_at(number: int, act: Callable[[], object], monkeypatch) -> None:
    """Has the next runs act as they are to write shard `number`."""
    write = ModelFolder.write_shard

    def stopping(self: ModelFolder, shard: int, *words: Any, **named: Any) -> None:
        if shard == number:
            act()
        write(self, shard, *words, **named)

    monkeypatch.setattr(ModelFolder, "write_shard", stopping)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def unfinished(source) -> Path:
    """A run that was interrupted in its last layer."""
    folder = source.parent / "unfinished"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(LAYERS - 1, interrupt, patch)
        assert puzzlemoe(*compress(source, folder)) == 130
    assert (folder / WORK / "shard-00001.json").exists() and not (folder / "config.json").exists()
    return folder


def test_resume_of_a_finished_run_says_so(source, packed, tmp_path, capsys):
    out, expected = tmp_path / "new" / "out", contents(packed)
    for _ in range(3):
        assert puzzlemoe(*compress(source, out, "--resume")) == 0
        assert contents(out) == expected
    assert f"{out} was finished already" in capsys.readouterr().out
    (out / WORK).mkdir()  # as when a run was killed while it removed it
    (out / WORK / "state-00000.safetensors").write_bytes(b"left")
    assert puzzlemoe(*compress(source, out, "--resume")) == 0
    assert contents(out) == expected
    assert puzzlemoe(*compress(source, out)) == 1
    assert "is not empty" in said(capsys)


def test_resume_of_another_finished_run_is_refused(source, packed, capsys):
    assert puzzlemoe(*compress(source, packed, "--resume", "--tau", "0.3")) == 1
    assert f"{packed} holds a finished model of another source, recipe" in (line := said(capsys))
    assert line.endswith("repeat that run's options, or name a new folder")


def test_a_finished_folder_that_was_changed_is_refused(source, packed, tmp_path, capsys):
    shard = "model-00002-of-00004.safetensors"
    for number, change in enumerate((empty, flip, Path.unlink)):
        out = copy(packed, tmp_path / f"out-{number}")
        change(out / shard)
        assert puzzlemoe(*compress(source, out, "--resume")) == 1
        assert f"{out / shard} is not as this run wrote it: empty {out}" in said(capsys)
    out = copy(packed, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    for quantization in (None, config["quantization_config"] | {"code": "angle16"}):
        (out / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        assert puzzlemoe(*compress(source, out, "--resume")) == 1
        said(capsys)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


def other_json(path: Path) -> None:
    path.write_text("[1]")


SECOND = "model-00002-of-00004.safetensors"
DAMAGE = [
    *[(f"{WORK}/shard-00001.json", change) for change in (empty, halve, other_json, Path.unlink)],
    *[(f"{WORK}/shard-00000.json", change) for change in (empty, Path.unlink)],
    *[(f"{WORK}/state-00001.safetensors", change) for change in (empty, halve, flip, Path.unlink)],
    *[(SECOND, change) for change in (empty, halve, flip, Path.unlink)],
]


@pytest.mark.parametrize(("name", "change"), DAMAGE)
def test_damage_sends_a_calibrated_run_back_to_its_start(source, packed, unfinished, tmp_path, caplog, name, change):
    """The states after layer 0 went when layer 1 was finished."""
    out = copy(unfinished, tmp_path / "out")
    change(out / name)
    assert puzzlemoe(*compress(source, out, "--resume")) == 0
    (line,) = caplog.messages
    assert line.startswith(f"{out}: ") and line.endswith("is not as the unfinished run wrote it: going on from layer 0")
    assert contents(out) == contents(packed)


def test_large_states_are_kept_from_time_to_time(source, packed, tmp_path, monkeypatch, caplog):
    """And a run goes on after those that were kept last."""
    out = tmp_path / "out"
    monkeypatch.setattr(output, "SMALL_STATES", 0)
    for kept, seconds in ((0, 0), (None, 3600)):
        shutil.rmtree(out, ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(output, "STATE_SECONDS", seconds)
            stop_at(1, lambda: patch.setattr(output, "STATE_SECONDS", 3600), patch)
            stop_at(LAYERS - 1, interrupt, patch)
            assert puzzlemoe(*compress(source, out)) == 130
        assert (out / WORK / "shard-00001.json").exists()
        states = [] if kept is None else [f"state-{kept:05d}.safetensors"]
        assert sorted(path.name for path in (out / WORK).glob("state-*")) == states
        begun = layers_begun(monkeypatch)
        assert puzzlemoe(*compress(source, out, "--resume")) == 0
        assert begun == list(range(len(states), LAYERS)) and contents(out) == contents(packed)
    assert not caplog.messages


def layers_begun(monkeypatch) -> list[int]:
    """Grows by the index of every layer that a run begins."""
    begun: list[int] = []
    observe = runner._observe
    monkeypatch.setattr(runner, "_observe", lambda job, index, *more: begun.append(index) or observe(job, index, *more))
    return begun


def test_the_states_kept_last_go_when_the_next_ones_are_there(tmp_path):
    folder = ModelFolder(tmp_path / "out", 4, {"format": "pt"})
    with folder.opened("run", False, 0):
        for number in range(3):
            folder.write_shard(number, {"a": torch.ones(1)}, torch.ones(number), None)
        folder.wait()
        assert [path.name for path in (tmp_path / "out" / WORK).glob("state-*")] == ["state-00002.safetensors"]


def test_without_calibration_only_what_is_damaged_is_made_again(source, tmp_path, monkeypatch, caplog):
    words = ["compress", source, tmp_path / "out", "--recipe", "paper", "--saliency", "magnitude", "--device", "cpu"]
    with monkeypatch.context() as patch:
        stop_at(LAYERS - 1, interrupt, patch)
        assert puzzlemoe(*words) == 130
    flip(tmp_path / "out" / SECOND)
    assert puzzlemoe(*words, "--resume") == 0
    assert (
        f"{SECOND}, or what is kept of it, is not as the unfinished run wrote it: going on from layer 1" in caplog.text
    )


@pytest.mark.parametrize("change", [empty, halve, other_json])
def test_a_damaged_run_json_is_refused(source, unfinished, tmp_path, capsys, change):
    out = copy(unfinished, tmp_path / "out")
    change(out / WORK / "run.json")
    assert puzzlemoe(*compress(source, out, "--resume")) == 1
    assert f"run.json is damaged, and with it is lost what run {out} holds: empty this folder" in said(capsys)


def test_a_run_that_did_not_come_to_begin_is_none(source, packed, tmp_path):
    out = tmp_path / "out"
    (out / WORK).mkdir(parents=True)
    (out / WORK / "lock").touch()
    (out / WORK / "partial").write_text('{"finger')
    assert puzzlemoe(*compress(source, out)) == 0
    assert contents(out) == contents(packed)


def test_one_run_at_a_time(source, unfinished, tmp_path, capsys):
    out = copy(unfinished, tmp_path / "out")
    with WorkFolder(out).locked():
        assert puzzlemoe(*compress(source, out, "--resume")) == 1
        assert f"{out}: another run is writing it: wait for that to end, or name another folder" in said(capsys)
    assert puzzlemoe(*compress(source, out, "--resume")) == 0


def test_partial_files_do_not_stay(source, packed, unfinished, tmp_path):
    out = copy(unfinished, tmp_path / "out")
    for name in (f"{SECOND}.partial", "state-00001.safetensors.partial", "partial", ".tmpXk2"):
        (out / WORK / name).write_bytes(b"half")
    assert puzzlemoe(*compress(source, out, "--resume")) == 0
    assert contents(out) == contents(packed)


@pytest.mark.parametrize("name", ["README.md", "config.json", SECOND, f"{WORK}/partial", f"{WORK}/lock", WORK, "extra"])
def test_links_in_the_output_are_not_followed(source, unfinished, tmp_path, capsys, name):
    out, victim = copy(unfinished, tmp_path / "out"), tmp_path / "victim"
    if name == WORK:
        shutil.move(out / WORK, victim)
    else:
        victim.write_text("mine")
        (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(victim)
    assert puzzlemoe(*compress(source, out, "--resume")) == 1
    assert f"{out / name} is a link, which no run makes: remove it, or name a new folder" in said(capsys)
    assert victim.is_dir() or victim.read_text() == "mine"


def test_files_are_never_written_through_links(tmp_path):
    victim, target, partial = (tmp_path / name for name in ("victim", "target", "partial"))
    victim.write_text("mine")
    target.symlink_to(victim)
    partial.symlink_to(victim)
    write_file(target, b"new", partial)
    assert victim.read_text() == "mine" and target.read_text() == "new" and not target.is_symlink()


def test_an_output_folder_in_the_source(tmp_path, capsys):
    source = build("mixtral", tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "deep" / "out", tmp_path / "link" / "out"):
        assert puzzlemoe("baseline", source, out, "--method", "int4", "--resume") == 1
        assert f"{out} is the source or lies inside it: name a folder elsewhere" in said(capsys)
    assert not (source / "deep").exists()


def test_a_failure_while_writing_behind_ends_the_run(source, packed, tmp_path, capsys, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(output, "record_shard", full)
        assert puzzlemoe(*compress(source, tmp_path / "out")) == 1
    assert "No space left on device" in (line := said(capsys)) and line.endswith(
        "--resume goes on from what was saved last"
    )
    assert puzzlemoe(*compress(source, tmp_path / "out", "--resume")) == 0
    assert contents(tmp_path / "out") == contents(packed)


def test_tensors_written_behind_are_those_written_before_the_call_returns(tmp_path):
    """And a disk that is full then ends the run at a later call, in one line that names the folder."""
    tensors, state = {"a": torch.arange(9.0), "b": torch.ones(2, 3)}, torch.rand(4, 5)
    for name, behind in (("now", False), ("behind", True)):
        folder = ModelFolder(tmp_path / name, 2, {"format": "pt"})
        with folder.opened("run", False, 0):
            folder.write_shard(0, tensors, state, None, behind)
            folder.write_shard(1, tensors, None, None, behind)
            folder.wait()
    for file in ("model-00001-of-00002.safetensors", f"{WORK}/shard-00000.json", f"{WORK}/shard-00001.json"):
        assert (tmp_path / "now" / file).read_bytes() == (tmp_path / "behind" / file).read_bytes()
    folder = ModelFolder(tmp_path / "full", 2, {"format": "pt"})
    with folder.opened("run", False, 0), files_up_to(1000):
        folder.write_shard(0, {"a": torch.zeros(1000)}, None, None, behind=True)
        with pytest.raises(WriteError, match=f"{tmp_path / 'full'} cannot be written"):
            folder.write_shard(1, tensors, None, None, behind=True)
            folder.wait()
    assert not list((tmp_path / "full").glob("*.safetensors"))


def test_shards_are_finished_in_order(tmp_path, monkeypatch):
    """A run that goes on has all shards before its last one, so that one which is ready sooner waits; and while two
    wait, no third is written."""
    first_may_end, second_is_read, begun = threading.Event(), threading.Event(), list[str]()

    def slow(path: Path) -> ShardRecord:
        begun.append(path.name)
        if "00001-of" in path.name:
            assert first_may_end.wait(30)
        else:
            second_is_read.set()
        return record_shard(path)

    monkeypatch.setattr(output, "record_shard", slow)
    folder = ModelFolder(tmp_path / "out", 3, {"format": "pt"})
    names = [folder.shard_name(number) for number in range(3)]
    with ThreadPoolExecutor(1) as caller, folder.opened("run", False, 0):
        for number in range(2):
            folder.write_shard(number, {"a": torch.zeros(9)}, None, None, behind=True)
        third = caller.submit(folder.write_shard, 2, {"a": torch.zeros(9)}, None, None, behind=True)
        assert second_is_read.wait(30)
        with pytest.raises(TimeoutError):
            third.result(0.2)
        assert not list(folder.folder.glob("*.safetensors")) and len(begun) == 2
        first_may_end.set()
        third.result(30)
        folder.wait()
    assert [path.name for path in sorted(folder.folder.glob("*.safetensors"))] == names


def test_no_shard_is_finished_after_one_that_failed(tmp_path, monkeypatch):
    def fails(path: Path) -> ShardRecord:
        if "00001-of" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return record_shard(path)

    monkeypatch.setattr(output, "record_shard", fails)
    folder = ModelFolder(tmp_path / "out", 2, {"format": "pt"})
    with folder.opened("run", False, 0), pytest.raises(WriteError, match="No space left"):
        for number in range(2):
            folder.write_shard(number, {"a": torch.zeros(9)}, None, None, behind=True)
        folder.wait()
    assert not list(folder.folder.glob("*.safetensors")) and not list(folder.work.path.glob("shard-*.json"))


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Writing beyond that many bytes of a file fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def unpack(source: Path, out: Path, *more: object) -> list[object]:
    return ["unpack", source.parent / "packed", out, *more]


def baseline(source: Path, out: Path, *more: object) -> list[object]:
    return ["baseline", source, out, "--method", "int4", "--device", "cpu", *more]


@pytest.mark.parametrize("command", [compress, unpack, baseline])
def test_every_command_that_writes_a_model_resumes_it(source, packed, tmp_path, capsys, monkeypatch, command):
    out, whole = tmp_path / "out", tmp_path / "whole"
    usage = type(shutil.disk_usage(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage(2000, 1000, 1000))
        assert puzzlemoe(*command(source, out)) == 1
    assert "and its disk has 1.0 kB left" in said(capsys) and not out.exists()
    with files_up_to(100_000):
        assert puzzlemoe(*command(source, out)) == 1
    assert said(capsys).endswith("make room or name another folder; --resume goes on from what was saved last")
    with monkeypatch.context() as patch:
        stop_at(1, interrupt, patch)
        assert puzzlemoe(*command(source, out, "--resume")) == 130
    assert said(capsys) == "error: interrupted; the same command with --resume goes on from what was saved last"
    assert puzzlemoe(*command(source, out)) == 1
    assert "holds an unfinished run: go on with --resume" in said(capsys)
    for _ in range(2):
        assert puzzlemoe(*command(source, out, "--resume")) == 0
    assert f"{out} was finished already" in capsys.readouterr().out
    assert puzzlemoe(*command(source, whole)) == 0
    assert contents(out) == contents(whole)


def test_room_for_what_is_not_written_yet_is_enough(source, unfinished, tmp_path, capsys, monkeypatch):
    out = copy(unfinished, tmp_path / "out")
    (out / "notes").mkdir()
    (out / "notes" / "large").write_bytes(bytes(1_000_000))  # counts for nothing
    needed = []
    monkeypatch.setattr(ModelFolder, "_check_space", lambda self, size: needed.append(size))
    assert puzzlemoe(*compress(source, tmp_path / "new")) == 0
    monkeypatch.undo()
    written = sum(path.stat().st_size for path in (*out.glob("*.safetensors"), *(out / WORK).iterdir()))
    usage = type(shutil.disk_usage(tmp_path))
    for free in (needed[0] - written - 1, needed[0] - written):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: usage(free, 0, free))
        status = puzzlemoe(*compress(source, out, "--resume"))
        if free < needed[0] - written:
            assert status == 1 and "make room or name a folder elsewhere" in said(capsys)
    assert status == 0


def test_a_terminated_run_resumes(source, packed, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(1, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        assert puzzlemoe(*compress(source, out)) == 143
    assert "--resume" in said(capsys)
    assert puzzlemoe(*compress(source, out, "--resume")) == 0
    assert contents(out) == contents(packed)


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGINT, ["inspect", "M"]), (signal.SIGTERM, ["unpack", "M", "O"])]
)
def test_a_signal_while_modules_are_imported_is_one_line(number, words):
    process = subprocess.Popen(
        [sys.executable, "-m", "puzzlemoe_offline", *words], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    caught = Path(f"/proc/{process.pid}/status")
    while not int(caught.read_text().split("SigCgt:")[1].split()[0], 16) & 1 << (signal.SIGTERM - 1):
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(0.3)  # well inside torch
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    advice = "; the same command with --resume goes on from what was saved last" if words[0] == "unpack" else ""
    assert (process.returncode, errors) == (128 + number, f"error: interrupted{advice}\n")


def test_a_signal_elsewhere_is_one_line_too(source, capsys, monkeypatch):
    monkeypatch.setattr("puzzlemoe_offline.cli.inspect.inspect", lambda checkpoint, quick: interrupt())
    assert puzzlemoe("inspect", source) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_kills_at_random_times_and_inside_every_step_of_finishing():
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "fuzz" / "kills.py", "--kills", "6", "--finishing"],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("6 kills at random times")
    assert int(second.split()[0]) > 25 and "each step of finishing: the same bytes" in second


def test_a_shard_is_finished_while_the_next_layers_are_made(source, packed, tmp_path, monkeypatch):
    """Each waits here for the layer after the next to begin."""
    out, begun = tmp_path / "out", [threading.Event() for _ in range(LAYERS)]
    finish, observe, recorded = ModelFolder._finish_shard, runner._observe, []

    def waiting(self: ModelFolder, number: int, *words: Any, **truths: bool) -> None:
        if number + 2 < LAYERS:
            assert begun[number + 2].wait(60)
        finish(self, number, *words, **truths)

    def beginning(job: Any, index: int, *words: Any) -> Any:
        recorded.append(len(list((out / WORK).glob("shard-*.json"))))
        begun[index].set()
        return observe(job, index, *words)

    monkeypatch.setattr(ModelFolder, "_finish_shard", waiting)
    monkeypatch.setattr(runner, "_observe", beginning)
    assert puzzlemoe(*compress(source, out)) == 0
    assert recorded == [0, 0, 0]
    assert contents(out) == contents(packed)
