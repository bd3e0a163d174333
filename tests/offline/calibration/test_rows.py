"""Rows of every format come back as they were written, and what cannot be read is one line that says where."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puzzlemoe_offline.calibration.rows import file_rows, hub_rows
from puzzlemoe_offline.calibration.sources import CalibrationError, HubDataset, TextFile, parse_origin

# What text can hold: NUL is what tells binary files.
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40), min_size=1)
# What type inference, null markers, byte order marks and other line ends make of texts.
TRICKY = [
    "2020-01-01",
    "NA",
    "null",
    "007",
    "1.50",
    "",
    "\ufeffx",
    'a "b", c',
    "a\r\nb\rc\nd",
    "\u2028\x85\x1c",
    "true",
]


def separated(delimiter: str) -> Callable[[list[str]], bytes]:
    def write(texts: list[str]) -> bytes:
        out = io.StringIO()
        writer = csv.writer(out, delimiter=delimiter)
        writer.writerows([["id", "text"], *enumerate(texts)])
        return out.getvalue().encode()

    return write


def parquet(texts: list[Any], column: str = "text") -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(texts)), column: texts}), out)
    return out.getvalue()


WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": lambda texts: "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode(),
    "b.ndjson": lambda texts: "\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts).encode(),
    "c.json": lambda texts: "\r\n".join(json.dumps({"text": text}) for text in texts).encode("utf-8-sig"),
    "d.json": lambda texts: json.dumps([{"text": text} for text in texts], indent=2).encode(),
    "e.json": lambda texts: ("\n " + json.dumps(texts)).encode(),
    "f.csv": separated(","),
    "g.tsv": separated("\t"),
    "h.parquet": parquet,
}
COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


def rows_of(path: Path, column: str | None = None) -> list[Any]:
    return list(file_rows(file(path), column))


def file(path: Path) -> TextFile:
    origin = parse_origin(str(path))
    assert isinstance(origin, TextFile)
    return origin


def refusal(path: Path, column: str | None = None) -> str:
    """What reading says; always one line that fits on a screen."""
    with pytest.raises(CalibrationError) as caught:
        rows_of(path, column)
    said = str(caught.value)
    assert len(said) <= 400 and said.isprintable()
    return said.replace(str(path.parent) + "/", "")


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=TEXTS)
def test_texts_come_back_as_they_were_written(tmp_path, name, texts):
    path = tmp_path / name
    for written in (texts, TRICKY):
        path.write_bytes(WRITERS[name](written))
        assert [(column, value) for _, column, value in rows_of(path)] == [("text", text) for text in written]


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("name", [name for name in WRITERS if name != "h.parquet"])
def test_compressed_files(tmp_path, name, compression):
    path = tmp_path / (name + compression)
    # Two members one after the other, as parallel compressors write them.
    content = WRITERS[name](TRICKY)
    path.write_bytes(COMPRESSED[compression](content[:50]) + COMPRESSED[compression](content[50:]))
    assert [value for _, _, value in rows_of(path)] == TRICKY


@pytest.mark.parametrize("compression", COMPRESSED)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff")))
def test_plain_text_is_one_row(tmp_path, compression, text):
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESSED[compression](text.encode()))
    plain = tmp_path / "plain"
    plain.write_bytes(text.encode())
    assert [value for _, _, value in rows_of(path)] == [plain.read_text(encoding="utf-8")]


def test_the_column(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    for row, asked, chosen in (
        ({"text": "a", "messages": chat}, None, "text"),
        ({"messages": chat, "conversations": chat, "id": 1}, None, "messages"),
        ({"id": 1, "conversations": chat}, None, "conversations"),
        ({"text": "a", "body": "b"}, "body", "body"),
    ):
        lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
        lines.write_text(json.dumps(row))
        pq.write_table(pa.Table.from_pylist([row]), table)
        for path in (lines, table):
            assert [row[1:] for row in rows_of(path, asked)] == [(chosen, row[chosen])]
    # Rows may differ: every row is asked anew.
    lines.write_text(f"{json.dumps({'text': 'a'})}\n{json.dumps({'messages': chat})}")
    assert [row[1:] for row in rows_of(lines)] == [("text", "a"), ("messages", chat)]


@pytest.mark.parametrize("asked", [None, "prose"])
def test_a_column_that_is_missing(tmp_path, asked):
    for name, content, where in (
        ("a.jsonl", b'{"prose": "fine", "text": "fine"}\n{"body": 1, "id": 2}', "a.jsonl:2"),
        ("a.json", b'[{"body": 1, "id": 2}]', "a.json row 1"),
        ("a.csv", b"body,id\n1,2\n", "a.csv"),
        ("a.parquet", parquet(["x"], "body"), "a.parquet"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        listed = "id, body" if name == "a.parquet" else "body, id"
        assert refusal(path, asked) == (
            f"{where} has no column {asked or 'text'}; there are: {listed}; choose one with --column NAME"
        )
    (tmp_path / "empty.jsonl").write_text("{}")
    assert "there are: none;" in refusal(tmp_path / "empty.jsonl", asked)
    (tmp_path / "wide.jsonl").write_text(json.dumps({"long name " * 99 + str(i): 0 for i in range(99)}))
    assert "and 94 more" in refusal(tmp_path / "wide.jsonl", "a\nb" * 999)


DEEP = b"[" * 200_000
DAMAGED = "; it may be damaged or cut short: write or fetch it again"
JSON_HINT = "; give an object a line, or one array of objects"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"fine\nfine\n\xe9\n", "a.txt:3 holds bytes that are no UTF-8; give text in UTF-8"),
        ("a.txt", "fine".encode("utf-16"), "a.txt:1 holds bytes that are no UTF-8; give text in UTF-8"),
        ("a", b"GGUF\x03\0\0\0", "a:1 holds a NUL byte, as binary files do; give text in UTF-8"),
        ("a.txt", gzip.compress(b"fine", mtime=0), "a.txt:1 holds bytes that are no UTF-8; give text in UTF-8"),
        (
            "a.jsonl",
            b'{"text": "fine"}\n{"text": "\xe9"}',
            "a.jsonl:2 holds bytes that are no UTF-8; give text in UTF-8",
        ),
        ("a.csv", b"text\n\xe9\n", "a.csv:2 holds bytes that are no UTF-8; give text in UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": ', f"a.jsonl:2 is no JSON (Expecting value){JSON_HINT}"),
        ("a.jsonl", b'\n{"text": "a"} {}', f"a.jsonl:2 is no JSON (Extra data){JSON_HINT}"),
        ("a.json", b'\n[{"text": "fine"},\n5 5]', f"a.json:3 is no JSON (Expecting ',' delimiter){JSON_HINT}"),
        ("a.json", b'{\n "text": "a"\n}', f"a.json:1 is no JSON (Expecting property name{{}}){JSON_HINT}"),
        ("a.json", DEEP, f"a.json:1 is no JSON (nested too deeply){JSON_HINT}"),
        ("a.jsonl", b'{"text":' + DEEP, f"a.jsonl:1 is no JSON (nested too deeply){JSON_HINT}"),
        ("a.jsonl", b"9" * 5000, f"a.jsonl:1 is no JSON ({{}}){JSON_HINT}"),
        ("a.jsonl", b"5", "a.jsonl:1: expected a JSON object, not a value of type int"),
        ("a.json", b"[null]", "a.json row 1: expected a JSON object, not a value of type NoneType"),
        ("a.csv", b'text,id\n"a\nb",1\nc,2,3\n', "a.csv:4 has 3 fields and the header 2: put texts that hold {}"),
        ("a.csv", b'id,text\n1,fine\n2,"open\n3,x\n', "a.csv:3 is no CSV (unexpected end of data): close its quotes{}"),
        ("a.tsv", b'text\n"a"b\n', "a.tsv:2 is no TSV ('\t' expected after '\"'): close its quotes{}"),
        ("a.csv", b"text,text\n1,2\n", "a.csv:1 has more than one column text: rename one"),
        ("a.csv", b"", "a.csv has no column text; there are: none; choose one with --column NAME"),
        ("a.parquet", b"PAR1" + b"x" * 99, "a.parquet could not be read: {}" + DAMAGED),
        (
            "a.parquet",
            parquet([b"x\xe9"] * 3)[:-20],
            "a.parquet could not be read: {}" + DAMAGED,
        ),
        *(
            (f"a.txt{suffix}", content, f"a.txt{suffix} could not be read: {{}}{DAMAGED}")
            for suffix, compress in list(COMPRESSED.items())[1:]
            for content in (b"plain text, really", compress(b"fine" * 999)[:-6])
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_line(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    head, _, tail = said.replace("\t", "\N{REPLACEMENT CHARACTER}").partition("{}")
    found = refusal(path)
    assert found.startswith(head) and found.endswith(tail)


def test_a_string_of_parquet_that_is_no_utf8(tmp_path):
    path = tmp_path / "a.parquet"
    column = pa.array([b"fine", b"\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), path)
    assert refusal(path) == "a.parquet row 2 holds bytes that are no UTF-8; give text in UTF-8"


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.touch()

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert refusal(path) == "a.txt could not be read: Permission denied"


def test_messages_of_a_long_path_fit(tmp_path):
    path = tmp_path / ("long-" * 40) / ("x" * 200 + ".jsonl")
    path.parent.mkdir()
    path.write_text(json.dumps({"column " * 9 + str(i): 0 for i in range(99)}))
    assert "x.jsonl:1 has no column text" in refusal(path)


WIKITEXT = HubDataset("owner/wiki", "raw", "test", "owner/wiki:raw:test")


def test_a_hub_dataset_is_streamed(monkeypatch):
    calls = []

    def load_dataset(*arguments: Any, **named: Any) -> Any:
        calls.append((arguments, named))
        return ({"id": i, "text": f"row {i}"} for i in range(3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [value for _, _, value in hub_rows(WIKITEXT, None, None)] == ["row 0", "row 1", "row 2"]
    assert calls == [(("owner/wiki", "raw"), {"data_files": None, "split": "test", "streaming": True})]
    with pytest.raises(CalibrationError, match=r"^owner/wiki:raw:test row 1 has no column body; there are: id, text;"):
        list(hub_rows(WIKITEXT, "body", None))


def test_the_library_itself_streams_from_a_folder(tmp_path, monkeypatch):
    # A folder stands in for the hub: the same library reads it in the same way, splits by file name.
    (tmp_path / "owner" / "set").mkdir(parents=True)
    (tmp_path / "owner" / "set" / "test.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    monkeypatch.chdir(tmp_path)
    dataset = HubDataset("owner/set", None, "test", "owner/set::test")
    assert [value for _, _, value in hub_rows(dataset, None, None)] == ["a", "b"]
    with pytest.raises(
        CalibrationError, match=r"dataset owner/set::dev could not be read \(ValueError: Bad split: dev"
    ):
        list(hub_rows(HubDataset("owner/set", None, "dev", "owner/set::dev"), None, None))


@pytest.mark.parametrize("late", [False, True])
def test_a_hub_dataset_that_cannot_be_read(monkeypatch, late):
    def rows() -> Any:
        yield {"text": "fine"}
        raise ConnectionError("no\nroute " * 99)

    def load_dataset(*_: Any, **__: Any) -> Any:
        if late:
            return rows()
        raise ConnectionError("no\nroute " * 99)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CalibrationError, match=r"dataset owner/wiki:raw:test could not be read \(Conn") as caught:
        list(hub_rows(WIKITEXT, None, None))
    assert len(str(caught.value)) <= 400 and str(caught.value).isprintable()
