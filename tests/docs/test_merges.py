"""No file was committed with a merge's two versions in it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = {".md", ".py", ".cu", ".cuh", ".h", ".cpp", ".toml", ".yaml", ".yml"}


def test_every_merge_was_finished():
    folders = ("benchmarks", "cuda", "docs", "examples", "puzzlemoe_offline", "puzzlemoe_vllm", "tests", "tools")
    files = [*ROOT.glob("*"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    texts = [path for path in files if path.suffix in SUFFIXES]
    assert len(texts) > 200
    assert [path for path in texts if re.search(r"^(<{7}|>{7}) ", path.read_text(), re.MULTILINE)] == []
