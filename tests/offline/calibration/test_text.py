"""Windows of tokens: which ones the seed chooses, from which source, and what becomes of chats and blank rows."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.models import build
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from puzzlemoe_offline.calibration.sources import CalibrationError
from puzzlemoe_offline.calibration.text import C4, C4_SHARD, HUB_POOL, SourceRecord, load_calibration, text_tokens
from puzzlemoe_offline.model.tokenizer import tokenizer_of


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A token per byte, no special tokens, and the chat template `role: content`."""
    return tokenizer_of(build("mixtral", tmp_path_factory.mktemp("model")))


def refusal(*arguments: Any, **named: Any) -> str:
    """What `load_calibration` says; always one line that fits on a screen."""
    with pytest.raises(CalibrationError) as caught:
        load_calibration(*arguments, **named)
    said = str(caught.value)
    assert len(said) <= 400 and said.isprintable()
    return said


def by_the_rule(rows: list[str], tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: int) -> Tensor:
    """The windows that a packed model depends on: rows one after the other, one window from each of equal parts."""
    ids = [token for row in rows for token in tokenizer(row)["input_ids"]]
    windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    parts, rng = min(samples, len(windows)), random.Random(seed)
    cuts = [part * len(windows) // parts for part in range(parts + 1)]
    return torch.tensor([windows[rng.randrange(*cuts[part : part + 2])] for part in range(parts)])


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(st.text("ab cé\n", min_size=1).filter(str.strip), min_size=1),
    samples=st.integers(1, 6),
    seed=st.integers(0, 9),
)
def test_the_windows_of_a_file(tmp_path, tokenizer, rows, samples, seed):
    rows.append("a text of more than one window")
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("".join(rows))
    lines.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    expected = by_the_rule(rows, tokenizer, samples, 8, seed)
    for path in (plain, lines):
        found = load_calibration(str(path), tokenizer, samples, 8, seed)
        assert found.tokens.dtype == torch.int64
        assert torch.equal(found.tokens, expected)


def test_the_seed_chooses_one_window_from_each_part_of_a_file(example):
    tokenizer, text = tokenizer_of(example / "model"), str(example / "calibration.txt")
    drawn = [load_calibration(text, tokenizer, 4, 128, seed).tokens for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    every = load_calibration(text, tokenizer, 10**6, 128).tokens
    assert torch.equal(every, load_calibration(text, tokenizer, 10**6, 128, 1).tokens)
    for windows in drawn:
        places = [int((every == window).all(dim=1).nonzero()[0]) for window in windows]
        assert [place * 4 // len(every) for place in places] == [0, 1, 2, 3]


def endless(prefix: str, read: list[int]) -> Iterator[dict[str, str]]:
    """Rows of 16 bytes without an end; `read` counts them."""
    while True:
        read.append(len(read))
        yield {"text": f"{prefix}{read[-1]:015d}"}


def test_the_seed_chooses_windows_of_a_hub_dataset(monkeypatch, tokenizer):
    read: list[int] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: endless("h", read))

    def drawn(seed: int) -> Tensor:
        read.clear()
        found = load_calibration("owner/name", tokenizer, 6, 32, seed)
        # No more is read than the seed chooses from.
        assert len(read) == HUB_POOL * 6 * 32 / 16
        assert found.sources == (SourceRecord("owner/name", 6, 6, HUB_POOL * 6 * 32, len(read), 0),)
        return found.tokens

    zero, again, one = drawn(0), drawn(0), drawn(1)
    assert torch.equal(zero, again) and not torch.equal(zero, one)
    rows = [f"h{number:015d}" for number in range(HUB_POOL * 6 * 2)]
    assert torch.equal(zero, by_the_rule(rows, tokenizer, 6, 32, 0))


def test_c4_is_read_from_one_shard(monkeypatch, tokenizer):
    calls: list[Any] = []

    def load_dataset(*arguments: Any, **named: Any) -> Any:
        calls.append((arguments, named["data_files"], named["split"]))
        return endless("c", [])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in (C4, f"{C4}:de", f"{C4}::validation"):
        load_calibration(source, tokenizer, 1, 8)
    assert calls == [
        ((C4, None), {"train": C4_SHARD}, "train"),
        ((C4, "de"), None, "train"),
        ((C4, None), None, "validation"),
    ]


def test_several_sources_by_weight(monkeypatch, tmp_path, tokenizer):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: endless("h", []))
    prose, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    prose.write_text("a" * 1000)
    rows.write_text('{"text": "bbbbbbbb"}\n' * 100)
    found = load_calibration([f"{prose}=1", f"{rows}=2", "owner/name=0.5"], tokenizer, 7, 8, 3)
    assert [bytes(window.tolist()).count(window[0].item()) for window in found.tokens[:6]] == [8] * 6
    # Each source's windows are those that it gives alone.
    for part, source, share in ((slice(0, 2), prose, 2), (slice(2, 6), rows, 4), (slice(6, 7), "owner/name", 1)):
        assert torch.equal(found.tokens[part], load_calibration(str(source), tokenizer, share, 8, 3).tokens)
    assert found.source == "a.txt (2), b.jsonl (4), owner/name (1)"
    assert [(record.name, record.share, record.windows) for record in found.sources] == [
        ("a.txt", 2, 2),
        ("b.jsonl", 4, 4),
        ("owner/name", 1, 1),
    ]
    assert found.digest != load_calibration([f"{prose}=2", f"{rows}=1", "owner/name=0.5"], tokenizer, 7, 8, 3).digest


def test_a_source_with_fewer_windows_than_its_share(tmp_path, tokenizer):
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("a" * 17)
    long.write_text("b" * 1000)
    found = load_calibration([str(short), str(long)], tokenizer, 10, 8)
    assert found.sources == (SourceRecord("short.txt", 5, 2, 17, 1, 0), SourceRecord("long.txt", 5, 5, 1000, 1, 0))
    assert found.source == "short.txt (2), long.txt (5)" and len(found.tokens) == 7


def test_a_file_goes_by_its_name(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("a" * 100)
    assert load_calibration(str(path), tokenizer, 2, 8).source == "a.txt"
    assert load_calibration(f"{path}=4", tokenizer, 2, 8).source == "a.txt"


def test_blank_rows_are_skipped_and_counted(tmp_path, tokenizer):
    rows = ["aaaa", "", " \n\t", None, "bbbb"]
    lines, table, csv = tmp_path / "a.jsonl", tmp_path / "a.parquet", tmp_path / "a.csv"
    lines.write_text("".join(json.dumps({"text": row}) + "\n\n" for row in rows))
    pq.write_table(pa.table({"text": rows}), table)
    csv.write_text('text\naaaa\n""\n" \n\t"\n\nbbbb\n')
    for path, blank in ((lines, 8), (table, 3), (csv, 3)):
        found = load_calibration(str(path), tokenizer, 1, 8)
        assert bytes_of(tokenizer, found.tokens[0]) == "aaaabbbb"
        assert found.blank_rows == blank and found.sources[0].rows == 2
    assert load_calibration([str(table), str(csv)], tokenizer, 2, 8).blank_rows == 6


def bytes_of(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> str:
    return tokenizer.decode(ids)


CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
]
SHARED = [{"from": "system", "value": "be kind"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
RENDERED = "system: be kind\nuser: hi\nassistant: ho\n"


@pytest.mark.parametrize(
    ("row", "column"),
    [({"messages": CHAT}, None), ({"conversations": SHARED}, None), ({"id": 1, "chosen": CHAT}, "chosen")],
)
def test_chats_go_through_the_chat_template(tmp_path, tokenizer, row, column):
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text(json.dumps(row))
    # Parquet writes None for the keys that only other messages have.
    key = list(row)[-1]
    pq.write_table(pa.Table.from_pylist([row | {key: [message | {"name": None} for message in row[key]]}]), table)
    for path in (lines, table):
        assert bytes_of(tokenizer, text_tokens(path, tokenizer, column).ids) == RENDERED
        found = load_calibration(str(path), tokenizer, 1, len(RENDERED), column=column)
        assert bytes_of(tokenizer, found.tokens[0]) == RENDERED


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"text": 5},
            "a.jsonl:2: text is of type int, not a string or a list of messages; mend the row or choose another",
        ),
        ({"text": {"a": 1}}, "a.jsonl:2: text is of type dict, not a string or a list of messages"),
        ({"text": "\ud800"}, r"a.jsonl:2 holds half a character ('\ud800', a lone surrogate): mend or drop the row"),
        (
            {"messages": "user: hi"},
            "a.jsonl:2: messages is of type str, not a list of messages; mend the row or choose",
        ),
        ({"messages": ["hi"]}, "a.jsonl:2: messages[0]: expected a message with role and content"),
        ({"messages": [*CHAT, {"role": "user"}]}, "a.jsonl:2: messages[3]: expected a message with role and content"),
        ({"messages": [{"role": [], "content": "hi"}]}, "a.jsonl:2: messages[0]: expected a message with role"),
        ({"conversations": [{"from": {}, "value": "hi"}]}, "a.jsonl:2: conversations[0]: expected a message"),
        ({"conversations": [{"from": "gpt", "value": 1}]}, "a.jsonl:2: conversations[0]: expected a message"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "a.jsonl:2: messages[0] holds half a character"),
    ],
)
def test_a_row_that_is_no_text_is_refused_by_line(tmp_path, tokenizer, row, said):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{json.dumps(row)}\n')
    assert said in refusal(str(path), tokenizer, 1, 8)


def test_a_chat_without_a_template_or_that_it_refuses(tmp_path):
    tokenizer = tokenizer_of(build("mixtral", tmp_path / "model"))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": CHAT}))
    tokenizer.chat_template = "{{ raise_exception('roles\nmust alternate' * 99) }}"
    assert "a.jsonl:1: the tokenizer's chat template refuses this chat (roles must" in refusal(
        str(path), tokenizer, 1, 8
    )
    tokenizer.chat_template = None
    assert "a.jsonl:1 is a chat, and the model's tokenizer has no chat template: give plain text" in refusal(
        str(path), tokenizer, 1, 8
    )


def test_text_that_is_too_short(tmp_path, tokenizer):
    for content, tokens in (("short", 5), ("", 0), (" \n" * 99, 0)):
        (tmp_path / "a.txt").write_text(content)
        assert f"a.txt has {tokens} tokens, fewer than one window of 64: give more text or a smaller" in refusal(
            str(tmp_path / "a.txt"), tokenizer, 4, 64
        )


def test_windows_longer_than_the_models_positions(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("a" * 100)
    # Refused before anything is read.
    assert refusal("gone.txt", tokenizer, 1, 65, max_positions=64) == (
        "--sequence-length 65 is longer than the model's 64 positions (max_position_embeddings): give "
        "--sequence-length 64 or less"
    )
    assert load_calibration(str(path), tokenizer, 1, 64, max_positions=64).tokens.shape == (1, 64)


def test_a_source_is_refused_before_another_is_read(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("read"))
    assert "gone.txt: no such file" in refusal(["owner/name", "gone.txt"], tokenizer, 4, 8)
    (tmp_path / "a.txt").write_text("a")
    assert "gets none of 4 samples" in refusal([f"{tmp_path}/a.txt", "owner/name=99"], tokenizer, 4, 8)


def test_a_column_of_plain_text(tmp_path, tokenizer):
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("a" * 100)
    lines.write_text(json.dumps({"body": "b" * 100}))
    assert "a.txt is plain text and has no columns: drop --column" in refusal(str(plain), tokenizer, 1, 8, 0, "body")
    found = load_calibration([str(plain), str(lines)], tokenizer, 2, 8, 0, "body")
    assert bytes_of(tokenizer, found.tokens.flatten()) == "aaaaaaaabbbbbbbb"


def test_texts_to_score_take_the_same_formats(tmp_path, tokenizer):
    plain, packed, lines = tmp_path / "a.txt", tmp_path / "b.txt.gz", tmp_path / "c.jsonl"
    plain.write_text("a text\nof two lines")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    lines.write_text(json.dumps({"text": plain.read_text()}) + "\n\n")
    for path in (plain, packed, lines):
        assert text_tokens(path, tokenizer).ids.tolist() == tokenizer(plain.read_text())["input_ids"]
    assert (text_tokens(lines, tokenizer).rows, text_tokens(lines, tokenizer).blank_rows) == (1, 1)
    for source in ("owner/name", "gone.txt", f"{plain}=2"):
        with pytest.raises(CalibrationError, match="no such file"):
            text_tokens(source, tokenizer)


def test_long_texts_give_no_warning(tmp_path, tokenizer, caplog):
    path = tmp_path / "a.jsonl"
    long = "a" * (tokenizer.model_max_length + 1)
    path.write_text(json.dumps({"text": long}) + "\n" + json.dumps({"messages": [{"role": "user", "content": long}]}))
    text_tokens(path, tokenizer)
    assert not caplog.records
