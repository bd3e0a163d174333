"""What names a source, and how samples are shared out."""

from __future__ import annotations

import os
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzlemoe_offline.calibration.sources import (
    CSV,
    JSON,
    PARQUET,
    PLAIN,
    TSV,
    CalibrationError,
    HubDataset,
    Source,
    TextFile,
    parse_source,
    parse_sources,
    shares,
)


def refusal(spelled: str) -> str:
    """What `parse_source` says; always one line that fits on a screen."""
    with pytest.raises(CalibrationError) as caught:
        parse_source(spelled)
    said = str(caught.value)
    assert len(said) <= 400 and said.isprintable()
    return said


@pytest.mark.parametrize(
    ("name", "format", "compression"),
    [
        ("prose", PLAIN, ""),
        ("prose.txt", PLAIN, ""),
        ("README.md", PLAIN, ""),
        ("wiki.test.raw", PLAIN, ""),
        ("prose.gz", PLAIN, ".gz"),
        ("prose.TXT.XZ", PLAIN, ".xz"),
        ("rows.jsonl", JSON, ""),
        ("rows.ndjson.zst", JSON, ".zst"),
        ("rows.json", JSON, ""),
        ("rows.csv.bz2", CSV, ".bz2"),
        ("rows.tsv", TSV, ""),
        ("train-00000-of-00001.parquet", PARQUET, ""),
    ],
)
def test_a_file_has_its_format_by_its_suffix(tmp_path, name, format, compression):
    path = tmp_path / name
    path.touch()
    assert parse_source(str(path)) == Source(TextFile(path, format, compression), Fraction(1))
    assert parse_source(f"{path}=2.5") == Source(TextFile(path, format, compression), Fraction(5, 2))


@pytest.mark.parametrize("name", ["a=1", "a=1.txt", "x=y=2", "C:\\data\\a.txt", "a=.txt"])
def test_a_file_with_an_equals_sign_in_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if not name.endswith(("1", "2")):
        (tmp_path / name).touch()
        assert parse_source(f"{name}=3").origin.name == name
        assert parse_source(f"{name}=3").weight == 3
        return
    # Ends in what could be a weight: the file of the whole name goes first.
    (tmp_path / name).touch()
    assert parse_source(name) == Source(TextFile(parse_source(name).origin.path, PLAIN, ""), Fraction(1))
    assert parse_source(f"{name}=3") == Source(TextFile(parse_source(name).origin.path, PLAIN, ""), Fraction(3))
    assert parse_source(name).origin.name == name


def test_a_hub_dataset():
    assert parse_source("allenai/c4").origin == HubDataset("allenai/c4", None, "train", "allenai/c4")
    wikitext = "Salesforce/wikitext:wikitext-2-raw-v1"
    assert parse_source(wikitext).origin == HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", "train", wikitext)
    weighted = parse_source("a/b-1.0:en:validation=3")
    assert weighted == Source(HubDataset("a/b-1.0", "en", "validation", "a/b-1.0:en:validation"), Fraction(3))
    assert parse_source("a/b::test").origin == HubDataset("a/b", None, "test", "a/b::test")


def test_what_is_no_source_is_refused_by_name(tmp_path):
    for name in ("model.gguf", "paper.pdf", "model.safetensors", "prose.zip", "notes.docx"):
        (tmp_path / name).touch()
        suffix = name[name.index(".") :]
        assert f"{name}: {suffix} is no format of text; plain text goes by .txt" in refusal(str(tmp_path / name))
    (tmp_path / "rows.parquet.gz").touch()
    assert "Parquet is compressed inside; unpack the file's .gz" in refusal(str(tmp_path / "rows.parquet.gz"))
    assert f"{tmp_path}: a folder; give a file of it" in refusal(str(tmp_path))
    assert "a folder" in refusal(f"{tmp_path}=2")
    os.mkfifo(tmp_path / "pipe.txt")
    assert "pipe.txt: not a regular file" in refusal(str(tmp_path / "pipe.txt"))
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone")
    assert "link.txt: not a regular file" in refusal(str(tmp_path / "link.txt"))
    for missing in ("gone.txt", "data/gone.jsonl", "data/gone.csv.gz", "data/gone.gz", "corpus", "./a/b", ""):
        assert f"{missing}: no such file; give a file, or a hub dataset as owner/name" in refusal(missing)
    assert "https://a.b/c.jsonl?x=1: a URL; download it" in refusal("https://a.b/c.jsonl?x=1")


def test_weights_that_are_none(tmp_path):
    text = tmp_path / "a.txt"
    text.touch()
    assert "a.txt=0: a weight is a number above 0" in refusal(f"{text}=0")
    for weight in ("-1", "", "nan", "1e3", "0x1", "9" * 5000):
        assert "a weight is a number above 0" in refusal(f"{text}={weight}")
    with pytest.raises(CalibrationError, match=r"a\.txt is given twice: give it once, with more weight"):
        parse_sources([str(text), f"{tmp_path}/../{tmp_path.name}/a.txt=2"])
    with pytest.raises(CalibrationError, match="no source of text"):
        parse_sources([])


@pytest.mark.parametrize(
    "spelled", ["x" * 100_000, "a\nb\x1b[31m", "\0", "a/" * 3000 + "b.gguf", "\udce9.txt", "=" * 999]
)
def test_a_hostile_name_is_cut_and_printable(spelled):
    refusal(spelled)


def test_a_long_path_fits(tmp_path):
    path = tmp_path / ("long-" * 40) / ("x" * 200 + ".gguf")
    path.parent.mkdir()
    path.touch()
    assert "x.gguf: .gguf is no format of text" in refusal(str(path))


def sources(weights: list[Fraction]) -> list[Source]:
    return [Source(HubDataset(f"a/{i}", None, "train", f"a/{i}"), weight) for i, weight in enumerate(weights)]


def test_samples_are_shared_out_by_weight():
    assert shares(sources([Fraction(1)]), 128) == [128]
    assert shares(sources([Fraction(3), Fraction(1)]), 128) == [96, 32]
    # Exact parts 1.43, 2.86, 5.71: the two largest remainders are rounded up.
    assert shares(sources([Fraction(1), Fraction(2), Fraction(4)]), 10) == [1, 3, 6]
    assert shares(sources([Fraction(1)] * 3), 4) == [2, 1, 1]
    with pytest.raises(CalibrationError, match="a/1 gets none of 4 samples: raise --samples or its weight"):
        shares(sources([Fraction(100), Fraction(1)]), 4)


@given(
    st.lists(st.integers(1, 1000).map(lambda weight: Fraction(weight, 7)), min_size=1, max_size=6), st.integers(6000)
)
def test_shares_are_whole_and_within_one_of_exact(weights, samples):
    parts = shares(sources(weights), samples)
    assert sum(parts) == samples
    assert all(abs(part - samples * w / sum(weights)) < 1 for part, w in zip(parts, weights, strict=True))
