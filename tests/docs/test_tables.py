"""The tables of README.md and docs/results.md are those of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables():
    return load_script("benchmarks/tables.py")


@pytest.mark.parametrize("document", ["README.md", "docs/results.md"])
def test_tables_are_current(tables, document):
    text = (ROOT / document).read_text()
    assert "<!-- table " in text
    assert tables.filled(text) == text, "run python benchmarks/tables.py"


def test_every_table_is_shown_once(tables):
    shown = [name for path in tables.DOCUMENTS for name in re.findall(r"<!-- table (.+?) -->", path.read_text())]
    assert set(shown) == set(tables.TABLES)


def test_a_changed_figure_is_found(tables):
    text = "<!-- table over http -->\n| 203 |\n<!-- end of table -->\n"
    assert tables.filled(text) != text and "2,465" in tables.filled(text)


def test_a_table_that_is_not_filled_yet_takes_no_text_with_it(tables):
    empty = "<!-- table over http -->\n<!-- end of table -->\n"
    text = tables.filled(f"{empty}between\n{empty}")
    assert text.count("2,465") == 2 and "\nbetween\n" in text


def test_layouts_of_several_gpus(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert len(tables.parallel().splitlines()) == 2  # no run is there: the columns alone
    apart = {"mean_difference": 0.25, "largest_difference": 1.5, "prompt_tokens": 4080, "alike": 200, "generated": 256}
    rows = [{"weights": "packed", "layout": "tp2"} | apart, {"weights": "unpacked", "layout": "tp2", "failed": "why"}]
    rows.append({"weights": "unpacked", "layout": "ep4"} | apart | {"alike": 7})
    result = {"model": "mixtral", "layers": 32, "code": "angle8", "rows": rows}
    (tmp_path / "parallel-some.json").write_text(json.dumps(result))
    label = "[mixtral, 32 layers, `angle8`](../benchmarks/results/parallel-some.json)"
    failed = "failed | failed | failed"
    assert tables.parallel().splitlines()[2:] == [
        f"| {label} | tensor parallel, 2 GPUs | 0.2500 | 1.5000 | 200 of 256 | {failed} |",
        f"| {label} | expert parallel, 4 GPUs | {failed} | 0.2500 | 1.5000 | 7 of 256 |",
    ]


@pytest.mark.parametrize("document", sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("*.md")))
def test_links_of_documents_lead_somewhere(document):
    check_links(ROOT / document)


@pytest.mark.parametrize("document", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_links_of_docs_lead_somewhere(document):
    check_links(ROOT / "docs" / document)


def check_links(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), target
