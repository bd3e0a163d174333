"""A packed folder from headers and digests: every change to it is found, and hostile ones cost one line."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.packed_folders import HIDDEN, KINDS, build, write
from torch import Tensor

from puzzlemoe_vllm.format.files import file_digest, open_regular, read_json_object
from puzzlemoe_vllm.format.headers import read_header
from puzzlemoe_vllm.format.layout import LayoutError, PuzzleConfig, parse_config
from puzzlemoe_vllm.format.packed_folder import check_headers
from puzzlemoe_vllm.format.shards import (
    INDEX,
    ShardRecord,
    check_digests,
    has_digests,
    index_with_records,
    read_index,
    record_shard,
    save_shard,
    shard_metadata,
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_accepted(tmp_path, kind):
    config = build(tmp_path, kind)
    headers = check_headers(tmp_path, config)
    check_digests(tmp_path)
    assert sorted(headers) == ["model-0.safetensors", "model-1.safetensors", "model-2.safetensors"]
    assert {name for header in headers.values() for name in header.tensors} == set(read_index(tmp_path))
    assert headers["model-2.safetensors"].tensors["lm_head.weight"].shape == (8, HIDDEN)
    assert record_shard(tmp_path / "model-0.safetensors").header_sha256 == headers["model-0.safetensors"].sha256


def one_line(error: pytest.ExceptionInfo[LayoutError]) -> str:
    text = str(error.value)
    assert len(text) <= 400 and text.isprintable(), text
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_found_and_the_file_named(tmp_path, kind):
    build(tmp_path, kind)
    for number in range(3):
        shard = tmp_path / f"model-{number}.safetensors"
        whole = shard.read_bytes()
        for place in range(0, len(whole), max(len(whole) // 23, 1)):
            shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            with pytest.raises(LayoutError, match=rf"model-{number}.safetensors: is damaged") as error:
                check_digests(tmp_path)
            one_line(error)
        shard.write_bytes(whole)
    check_digests(tmp_path)


Change = Callable[[dict[str, Tensor]], object]
HEADER_CHANGES: dict[str, Change] = {
    "dropped": lambda tensors: tensors.popitem(),
    "added": lambda tensors: tensors.update(stray=torch.zeros(1)),
    "renamed": lambda tensors: tensors.update(stray=tensors.popitem()[1]),
    "retyped": lambda tensors: tensors.update({(last := tensors.popitem())[0]: last[1].view(torch.float16)}),
    "reshaped": lambda tensors: tensors.update({(last := tensors.popitem())[0]: last[1].reshape(2, -1)}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", HEADER_CHANGES)
@pytest.mark.parametrize("number", range(3))
def test_every_changed_tensor_is_found(tmp_path, kind, change, number):
    config = build(tmp_path, kind)
    shard = tmp_path / f"model-{number}.safetensors"
    tensors = load_file(shard)
    HEADER_CHANGES[change](tensors)
    save_shard(tensors, shard, shard_metadata(config.code))
    with pytest.raises(LayoutError, match=rf"model-{number}.safetensors: its tensors are not those") as error:
        check_headers(tmp_path, config)
    one_line(error)


def rewritten(folder: Path, kind: str, change: Change) -> PuzzleConfig:
    """A folder whose index was written after the change to its first shard."""
    config = build(folder, kind)
    shards = [load_file(folder / f"model-{number}.safetensors") for number in range(3)]
    change(shards[0])
    return write(folder, shards, config.model_dump(mode="json", exclude_none=True))


A, B = "model.layers.0.mlp.experts.2.up_proj", "model.layers.0.mlp.experts.5.down_proj"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("mask16", lambda t: t.pop(f"{A}.puzzle"), "no puzzle of expert 2, up_proj"),
        ("angle8", lambda t: t.pop(f"{A}.puzzle_grid"), "no puzzle_grid of expert 2, up_proj"),
        ("angle8", lambda t: t.pop(f"{B}.weight"), "no weight of expert 5, down_proj"),
        ("mask6", lambda t: t.pop(f"{B}.weight"), "no weight of expert 5, down_proj"),
        ("mask16", lambda t: t.update({f"{A}.puzzle_grid": torch.ones(1, 1)}), "puzzle_grid, which layer 0"),
        ("mask16", lambda t: t.update({f"{B}.weight": torch.ones(1, 1)}), "which layer 0 .* does not name"),
        ("mask6", lambda t: t.update({f"{A}.puzzle": torch.ones(1, 1)}), "which layer 0 .* does not name"),
        ("clusters", lambda t: t.update({f"{B}.weight": torch.ones(1, 1)}), "which layer 0 .* does not name"),
        ("mask16", lambda t: t.update({f"{A}.foo": torch.ones(1)}), "foo is no tensor of a packed layer"),
        ("mask16", lambda t: t.update({f"{A}.puzzle": t[f"{A}.puzzle"].byte()}), "dtype U8, expected I16"),
        ("angle8", lambda t: t.update({f"{A}.puzzle_grid": t[f"{A}.puzzle_grid"].half()}), "dtype F16, expected BF16"),
        ("angle8", lambda t: t.update({f"{B}.weight": t[f"{B}.weight"].float()}), "dtype F32, expected BF16"),
        ("mask16", lambda t: t.update({f"{A}.puzzle": t[f"{A}.puzzle"][:-1].clone()}), "does not fit"),
        ("mask16", lambda t: t.update({f"{A}.puzzle": t[f"{A}.puzzle"].flatten()}), "does not fit"),
        ("angle8", lambda t: t.update({f"{A}.puzzle_grid": t[f"{A}.puzzle_grid"][:, :1].clone()}), "does not fit"),
        ("angle8", lambda t: t.update({f"{B}.weight": t[f"{B}.weight"][:, 1:].clone()}), "does not fit"),
        ("trellis6", lambda t: t.update({f"{A}.puzzle": t[f"{A}.puzzle"][:, 1:].clone()}), "does not fit"),
        ("trellis6", lambda t: t.update({f"{A}.puzzle": t[f"{A}.puzzle"][:, 96:].clone()}), "does not fit"),
        ("trellis6", lambda t: t.update({f"{A}.puzzle": t[f"{A}.puzzle"][:3].clone()}), "does not fit"),
    ],
)  # fmt: skip
def test_experts_that_are_not_what_the_config_says(tmp_path, kind, change, message):
    config = rewritten(tmp_path, kind, change)
    with pytest.raises(LayoutError, match=message) as error:
        check_headers(tmp_path, config)
    one_line(error)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("mask16", {"code": "angle16"}, "holds mask16 words, config.json says angle16"),
        ("angle8", {"code": "angle6"}, "holds angle8 words, config.json says angle6"),
        ("angle8", {"group_size": 64}, "does not fit"),
        ("mask16", {"merged_experts": {"0": 16, "1": 6}}, "merges 16 experts of layer 0, the model has 6"),
        ("mask16", {"merged_experts": {"0": 6, "1": 6, "99": 6}}, "no puzzle of expert 0, .*layer 99"),
        ("mask16", {"merged_experts": {"0": 6}}, "holds model.layers.1.mlp.experts.0.*which layer 1"),
        ("mask16", {"merged_experts": {"0": 6, "1": 4}}, "holds model.layers.1.mlp.experts.4.*which layer 1"),
        ("clusters", {"clusters": {"0": [0, 0, 2, 2, 0, 2]}}, "experts.5.*which layer 1"),
        ("clusters", {"clusters": {"0": [0, 0, 2, 2, 2, 2], "1": [5] * 6}}, "is not the one that the model"),
        ("clusters", {"clusters": {"0": [0, 0, 2], "1": [5] * 6}}, "clusters of 3 experts in layer 0, the model has 6"),
    ],
)  # fmt: skip
def test_a_config_that_was_edited(tmp_path, kind, fields, message):
    config = build(tmp_path, kind)
    edited = parse_config(config.model_dump(mode="json") | fields)
    with pytest.raises(LayoutError, match=message) as error:
        check_headers(tmp_path, edited)
    one_line(error)


@pytest.mark.parametrize("experts", [2**31, 10**30])
def test_sizes_in_config_json_are_not_trusted(tmp_path, experts):
    config = build(tmp_path, "angle8")
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": experts}))
    with pytest.raises(LayoutError, match="no weight of expert 6"):
        check_headers(tmp_path, config)
    huge = parse_config(config.model_dump(mode="json") | {"merged_experts": {"0": experts // 2 * 2}})
    with pytest.raises(LayoutError, match="which layer 0"):
        check_headers(tmp_path, huge)


def test_a_shard_of_another_version(tmp_path):
    config = build(tmp_path, "mask16")
    shard = tmp_path / "model-1.safetensors"
    for metadata, message in (
        ({"format": "pt"}, "is no shard of a packed model"),
        (shard_metadata("mask16") | {"puzzlemoe_format_version": "3"}, "is of format version 3, config.json is of 2"),
    ):
        save_shard(load_file(shard), shard, metadata)
        with pytest.raises(LayoutError, match=f"model-1.safetensors: {message}"):
            check_headers(tmp_path, config)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors", "/etc/passwd", "", ".", "..", "sub/model.safetensors", "a\\b.safetensors",
        "nul\0.safetensors", "x" * 300, "é" * 200, "x" * 100_000, 7, None, ["a"],
    ],
)  # fmt: skip
def test_an_index_names_plain_files_only(tmp_path, name):
    config = build(tmp_path, "mask16")
    edit_index(tmp_path, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    for check in (read_index, lambda folder: check_headers(folder, config)):
        with pytest.raises(LayoutError, match=r"which is no plain file name inside the folder") as error:
            check(tmp_path)
        one_line(error)


def test_only_regular_files_are_opened(tmp_path):
    folder = tmp_path / "model"
    config = build(folder, "mask16")
    shard, outside = folder / "model-1.safetensors", tmp_path / "outside.safetensors"
    shard.rename(outside)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: None, "is missing"),
        (lambda: os.mkfifo(shard), "is not a regular file"),
        (lambda: shard.mkdir(), "is not a regular file"),
        (lambda: shard.symlink_to("/dev/zero"), "is a link to a file outside the model folder"),
        (lambda: shard.symlink_to(outside), "is a link to a file outside the model folder"),
        (lambda: shard.symlink_to(shard), "cannot be read|is a link"),
    ]
    for make, message in cases:
        make()
        for check in (read_index, check_digests, lambda folder: check_headers(folder, config)):
            with pytest.raises(LayoutError, match=f"model-1.safetensors: ({message})") as error:
                check(folder)
            one_line(error)
        if shard.is_dir() and not shard.is_symlink():
            shard.rmdir()
        else:
            shard.unlink(missing_ok=True)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    config = build(snapshot, "angle8")
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    check_headers(snapshot, config)
    check_digests(snapshot)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'{"weight_map": {}}', "has no weight_map"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "a stands in it twice"),
        (b'{"weight_map": {"a": "x"}, "n": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_a_damaged_index(tmp_path, text, message):
    config = build(tmp_path, "mask16")
    (tmp_path / INDEX).write_bytes(text)
    for check in (read_index, lambda folder: check_headers(folder, config)):
        with pytest.raises(LayoutError, match=message) as error:
            check(tmp_path)
        one_line(error)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(metadata=None),
        lambda index: index.update(metadata=[]),
        lambda index: index["metadata"].pop("shards"),
        lambda index: index["metadata"]["shards"].update({"model-0.safetensors": 7}),
        lambda index: index["metadata"]["shards"]["model-0.safetensors"].update(sha256="x"),
        lambda index: index["metadata"]["shards"].pop("model-0.safetensors"),
        lambda index: index["metadata"]["shards"].update(other=index["metadata"]["shards"]["model-0.safetensors"]),
    ],
)
def test_an_index_without_whole_records(tmp_path, change):
    config = build(tmp_path, "mask16")
    edit_index(tmp_path, change)
    for check in (check_digests, lambda folder: check_headers(folder, config)):
        with pytest.raises(LayoutError, match="digests") as error:
            check(tmp_path)
        one_line(error)


def test_a_dense_folder_has_digests_but_no_layout(tmp_path):
    config = build(tmp_path, "mask16")
    assert has_digests(tmp_path)
    edit_index(tmp_path, lambda index: index["metadata"].pop("layout_sha256"))
    check_digests(tmp_path)
    with pytest.raises(LayoutError, match="no digests"):
        check_headers(tmp_path, config)
    edit_index(tmp_path, lambda index: index["metadata"].pop("shards"))
    assert not has_digests(tmp_path)
    (tmp_path / INDEX).unlink()
    assert not has_digests(tmp_path)


def test_a_folder_inside_that_is_a_link_leads_nowhere(tmp_path):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "a.jinja").touch()
    (folder / "templates").symlink_to(outside)
    with pytest.raises(LayoutError, match="is a link to a file outside the model folder"):
        open_regular(folder / "templates" / "a.jinja", folder)
    (folder / "own").mkdir()
    (folder / "own" / "a.jinja").touch()
    open_regular(folder / "own" / "a.jinja", folder).close()


def test_an_index_that_does_not_fit_the_shards(tmp_path):
    config = build(tmp_path, "mask16")
    whole = (tmp_path / INDEX).read_text()
    for change, message in (
        (lambda m: m.pop("lm_head.weight"), "does not name|digests are of other"),
        (lambda m: m.pop("model.layers.0.mlp.gate.weight"), r"does not name tensor model.layers.0.mlp.gate.weight"),
        (lambda m: m.update(ghost="model-0.safetensors"), "tensor ghost is missing"),
        (
            lambda m: m.update({"lm_head.weight": "model-0.safetensors", "ghost": "model-2.safetensors"}),
            "does not name",
        ),
    ):
        (tmp_path / INDEX).write_text(whole)
        edit_index(tmp_path, lambda index, change=change: change(index["weight_map"]))
        with pytest.raises(LayoutError, match=message):
            check_headers(tmp_path, config)


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "consolidated.00.safetensors", "adapter_model.safetensors"]
)
def test_other_weights_beside_the_shards(tmp_path, name):
    config = build(tmp_path, "mask16")
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(LayoutError, match=f"{name}: is none of the files .* move it out of the folder"):
        check_headers(tmp_path, config)


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(**fields: Any) -> dict[str, Any]:
    return {"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]} | fields}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git-lfs pointer.*git lfs pull"),
        (b"", "no safetensors file, or cut short"),
        (b"\xff" * 100, "no safetensors file, or cut short"),
        (struct.pack("<Q", 50) + b"{}", "no safetensors file, or cut short"),
        (raw(b"[" * 100_000), "nested too deeply"),
        (raw(b'{"a":1,"a":2}'), "a stands in it twice"),
        (raw([]), "not a JSON object"),
        (raw({"__metadata__": {"a": 1}}), "__metadata__ is not text"),
        (raw({"a": []}), "header of tensor a is damaged"),
        (raw(tensor(shape=[True, 2]), b"1234"), "header of tensor a is damaged"),
        (raw(tensor(shape=[-2]), b"1234"), "header of tensor a is damaged"),
        (raw(tensor(shape=[1] * 100_000), b"1234"), "header of tensor a is damaged"),
        (raw(tensor(shape=[2**40, 2**40]), b"1234"), "does not fit its bytes"),
        (raw(tensor(data_offsets=[4, 0]), b"1234"), "does not fit its bytes"),
        (raw(tensor(dtype="Q9"), b"1234"), "unknown dtype Q9"),
        (raw(tensor(), b"12345678"), "has 8 bytes of tensors, its header says 4"),
        (raw(tensor(), b"12"), "has 2 bytes of tensors, its header says 4"),
        (raw(tensor(data_offsets=[2, 6]), b"123456"), "overlaps or leaves a hole"),
        (raw(tensor() | {"b" * 5000: tensor()["a"]}, b"1234"), "overlaps or leaves a hole"),
    ],
)
def test_a_damaged_header(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(LayoutError, match=f"a.safetensors: .*{message}") as error:
        read_header(path)
    one_line(error)


KEYS = st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"])
VALUES = st.none() | st.integers() | st.text(max_size=4) | st.sampled_from(["dtype", "shape", "BF16", "data_offsets"])
HEADERS = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=60), header=HEADERS)
def test_no_header_does_more_than_raise(tmp_path_factory, content, header):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    for text in (content, raw(header, content)):
        path.write_bytes(text)
        try:
            read_header(path)
        except LayoutError as error:
            assert len(str(error)) <= 400


def test_records(tmp_path):
    build(tmp_path, "mask16")
    shard = tmp_path / "model-0.safetensors"
    record = record_shard(shard)
    assert record == ShardRecord.model_validate(json.loads(record.model_dump_json()))
    assert record.bytes == shard.stat().st_size and record.sha256 == file_digest(shard)
    given_records = {"model-0.safetensors": record.model_copy(update={"sha256": "0" * 64})}
    index = index_with_records(tmp_path, read_index(tmp_path), 5, None, given_records)
    assert index["metadata"]["total_size"] == 5 and "layout_sha256" not in index["metadata"]
    assert index["metadata"]["shards"]["model-0.safetensors"]["sha256"] == "0" * 64
    assert (
        index["metadata"]["shards"]["model-1.safetensors"]
        == record_shard(tmp_path / "model-1.safetensors").model_dump()
    )


def test_shards_of_clusters_have_no_code():
    assert shard_metadata(None) == {"format": "pt", "puzzlemoe_format_version": "2"}
    assert shard_metadata("angle8")["puzzlemoe_code"] == "angle8"


def test_equal_shards_are_equal_bytes(tmp_path):
    tensors = {"b": torch.zeros(3), 'a "quoted" é': torch.ones(2, 5)}
    metadata = {"format": "pt"} | {f"key{number}": "value" for number in range(8)}
    written = set()
    for number in range(8):
        path = tmp_path / f"{number}.safetensors"
        save_shard(tensors, path, dict(sorted(metadata.items(), reverse=bool(number % 2))))
        written.add(path.read_bytes())
    assert len(written) == 1
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())
    assert read_header(path).metadata == metadata


def test_half_a_character_is_no_json_of_a_file(tmp_path):
    """A lone surrogate can be spelled in JSON but not written to a file again."""
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "\\ud83d\\ude00"}')
    assert read_json_object(path) == {"model_type": "\U0001f600"}
    path.write_text('{"model_type": "\\ud800"}')
    with pytest.raises(LayoutError, match=r"config\.json: holds half a character"):
        read_json_object(path)
