"""docs/architecture.md draws the tree as it is."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DRAWN = ("puzzlemoe_offline", "puzzlemoe_vllm", "cuda")
SUFFIXES = {".py", ".cu", ".cuh", ".h"}


def drawn_files() -> list[str]:
    """Paths of the files that the picture names, of the rooms in `DRAWN`."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    picture = text.split("## The house")[1].split("```")[1]
    files, rooms = [], {}
    for line in picture.splitlines():
        found = re.match(r"( *)(\S+)", line)
        if found is None:
            continue
        depth, name = len(found[1]) // 2, found[2]
        above = "/".join(rooms[level] for level in range(depth))
        if name.endswith("/"):
            rooms[depth] = name.rstrip("/")
        elif depth:
            files.append(f"{above}/{name}")
    return files


def test_every_file_has_its_line():
    there = {
        path.relative_to(ROOT).as_posix()
        for room in DRAWN
        for path in (ROOT / room).rglob("*")
        if path.suffix in SUFFIXES and path.name not in ("__init__.py", "__main__.py")
    }
    drawn = drawn_files()
    assert len(drawn) == len(set(drawn)) > 90
    assert there - set(drawn) == set(), "give each of these files its line in docs/architecture.md"
    assert set(drawn) - there == set(), "docs/architecture.md names files that are gone"


def test_the_glossary_is_short():
    text = (ROOT / "docs" / "architecture.md").read_text()
    glossary = text.split("## One word, one meaning")[1].split("\n## ")[0]
    assert len([line for line in glossary.splitlines() if line.startswith("| ")]) <= 16
