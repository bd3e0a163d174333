"""The command itself: its version, completion, what it prints to be pasted into a shell, and sizes."""

import os
import shlex

import pytest
from support.command import puzzlemoe
from support.models import build

from puzzlemoe_offline import entry
from puzzlemoe_offline.cli import main
from puzzlemoe_offline.version import VERSION

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"


@pytest.mark.parametrize(("given", "used"), [(None, "expandable_segments:True"), ("backend:native", "backend:native")])
def test_segments_of_gpu_memory_grow_unless_the_user_says_otherwise(given, used, monkeypatch):
    monkeypatch.setenv(ALLOCATOR, given or "")
    if given is None:
        monkeypatch.delenv(ALLOCATOR)
    found = []
    monkeypatch.setattr(entry, "exit_at_once", lambda: None)
    monkeypatch.setattr(main, "main", lambda began: found.append(os.environ[ALLOCATOR]))
    entry.main()
    assert found == [used]


def test_version_and_completion(capsys):
    assert puzzlemoe("--version") == 0
    assert capsys.readouterr().out == f"puzzlemoe-vllm {VERSION}\n"
    assert puzzlemoe("--help") == 0
    assert "--install-completion" in capsys.readouterr().out


def test_the_serve_command_is_quoted_and_sizes_have_fitting_units(tmp_path, capsys):
    source, out = build("mixtral", tmp_path / "source"), tmp_path / "it's here; $(x)"
    assert puzzlemoe("compress", source, out, "--recipe", "paper", "--saliency", "magnitude", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert shlex.split(printed.splitlines()[-1].split("serve it with: ")[1]) == ["vllm", "serve", str(out)]
    assert "expert weights  1.2 MB -> 589.8 kB" in printed
    assert puzzlemoe("inspect", out) == 0
    assert "589.8 kB" in capsys.readouterr().out
    assert "589.8 kB instead of 1.2 MB" in (out / "README.md").read_text()
