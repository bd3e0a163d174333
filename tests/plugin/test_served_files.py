"""The folder that vLLM reads from, wherever it is, is checked before it serves."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.packed_folders import build

from puzzlemoe_vllm.format.layout import LayoutError
from puzzlemoe_vllm.format.shards import INDEX

served_files = pytest.importorskip("puzzlemoe_vllm.served_files")


@pytest.fixture(autouse=True)
def _warnings_reach_pytest(monkeypatch):
    monkeypatch.setattr(logging.getLogger("puzzlemoe_vllm"), "propagate", True)


def model_config(model: object, **fields) -> SimpleNamespace:
    return SimpleNamespace(**({"model": str(model), "revision": None, "model_weights": ""} | fields))


def damage(folder: Path) -> None:
    """One bit of a header."""
    shard = folder / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b"model.layers.1.", b"model.layers.2.", 1))


@pytest.fixture
def hub(tmp_path) -> tuple[Path, Path]:
    """A hub cache that holds the model someone/moe, and the model's folder in it."""
    repository = tmp_path / "models--someone--moe"
    folder = repository / "snapshots" / "0123"
    folder.parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    return tmp_path, folder


def test_a_model_of_the_hub_is_checked_once_it_is_here(hub):
    cache, folder = hub
    files = served_files.ServedFiles(build(folder, "angle8"))
    files.check_at_start("someone/moe")
    files.check_while_loading(model_config("someone/moe"), str(cache))
    damage(folder)
    with pytest.raises(LayoutError, match=r"model-1.safetensors: its tensors are not those"):
        served_files.ServedFiles(files.layout).check_while_loading(model_config("someone/moe"), str(cache))


def test_a_model_of_the_hub_without_an_index(hub, monkeypatch):
    cache, folder = hub
    files = served_files.ServedFiles(build(folder, "angle8"))
    (folder / INDEX).unlink()

    def missing(*args, **kwargs):
        raise served_files.EntryNotFoundError("404")

    monkeypatch.setattr(served_files, "hf_hub_download", missing)
    with pytest.raises(LayoutError, match=rf"someone/moe has no {INDEX}: upload or download all files"):
        files.check_while_loading(model_config("someone/moe"), str(cache))


@pytest.mark.parametrize("place", ["object storage", "modelscope", "no network"])
def test_what_is_out_of_reach_is_warned_of(tmp_path, monkeypatch, caplog, place):
    files = served_files.ServedFiles(build(tmp_path / "model", "angle8"))

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(served_files, "hf_hub_download", unreachable)
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", str(place == "modelscope"))
    weights = "s3://bucket/moe" if place == "object storage" else ""
    for _ in range(2):
        files.check_while_loading(model_config("someone/moe", model_weights=weights), str(tmp_path))
    assert len([record for record in caplog.records if "not checked" in record.getMessage()]) == 1


def test_a_folder_is_checked_again_when_its_index_was_replaced(tmp_path):
    files = served_files.ServedFiles(build(tmp_path / "model", "angle8"))
    files.check_while_loading(model_config(tmp_path / "model"), None)
    damage(tmp_path / "model")
    files.check_while_loading(model_config(tmp_path / "model"), None)
    (tmp_path / "model" / INDEX).touch()
    for _ in range(2):
        with pytest.raises(LayoutError, match="its tensors are not those"):
            files.check_while_loading(model_config(tmp_path / "model"), None)


@pytest.mark.parametrize(("value", "local_rank", "found"), [("1", 0, True), ("1", 3, False), ("0", 0, False)])
def test_digests_are_compared_once_a_node_and_only_if_asked_for(tmp_path, monkeypatch, value, local_rank, found):
    files = served_files.ServedFiles(build(tmp_path, "angle8"))
    shard = tmp_path / "model-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    monkeypatch.setenv("PUZZLEMOE_VERIFY", value)
    monkeypatch.setattr(served_files, "get_world_group", lambda: SimpleNamespace(local_rank=local_rank))
    if not found:
        return files.check_while_loading(model_config(tmp_path), None)
    with pytest.raises(LayoutError, match=r"model-2.safetensors: is damaged"):
        files.check_while_loading(model_config(tmp_path), None)
    return None


def test_another_wish_than_0_or_1(monkeypatch):
    monkeypatch.setenv("PUZZLEMOE_VERIFY", "yes")
    with pytest.raises(ValueError, match="PUZZLEMOE_VERIFY=yes: set it to 1"):
        served_files.wants_digests()


def test_a_draft_model_is_told_from_its_target(tmp_path):
    files = served_files.ServedFiles(build(tmp_path, "angle8"))
    files.check_at_start(str(tmp_path))
    target, draft = model_config("target"), model_config(tmp_path)
    assert files.source(SimpleNamespace(model_config=draft, speculative_config=None)) is draft
    speculative = SimpleNamespace(draft_model_config=draft)
    assert files.source(SimpleNamespace(model_config=target, speculative_config=speculative)) is draft
    assert files.source(SimpleNamespace(model_config=target, speculative_config=None)) is None
