"""A model of the hub, with a fake hub: headers before weights, no weights for a plan, and the commit that was read."""

from __future__ import annotations

import fnmatch
import json
import shutil
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from support.models import build
from support.runs import compress_pairs
from typer.testing import CliRunner

from puzzlemoe_offline.cli.main import app
from puzzlemoe_offline.model import hub
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.hub import locate, open_by_headers
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.model.weight_files import CheckpointError
from puzzlemoe_vllm.errors import UserError
from puzzlemoe_vllm.format.headers import read_header
from puzzlemoe_vllm.format.shards import INDEX

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HEAD = "lm_head.weight"


@dataclass
class FakeHub:
    """One repository, with what was asked of it."""

    remote: Path
    cache: Path
    revisions: list[str | None] = field(default_factory=list)

    @property
    def fetched(self) -> set[str]:
        """Names of the files that were downloaded."""
        return {path.name for path in self.snapshot.rglob("*") if path.is_file()}

    @property
    def snapshot(self) -> Path:
        return self.cache / "models--owner--model" / "snapshots" / COMMIT

    def snapshot_download(self, source: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert source == "owner/model"
        self.revisions.append(revision)
        blobs = self.snapshot.parent.parent / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for path in self.remote.iterdir():
            target = self.snapshot / path.name
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns) and not target.exists():
                shutil.copyfile(path, blobs / path.name)
                target.symlink_to(Path("../../blobs") / path.name)
        return str(self.snapshot)

    def list_repo_files(self, source: str, revision: str | None) -> list[str]:
        assert revision == COMMIT
        return [path.name for path in self.remote.iterdir()]

    def read_range(self, source: str, commit: str, file: str, first: int, end: int) -> tuple[bytes, int]:
        assert commit == COMMIT
        content = (self.remote / file).read_bytes()
        return content[first:end], len(content)


@pytest.fixture
def fake(tmp_path, monkeypatch) -> FakeHub:
    fake = FakeHub(build("qwen3_moe", tmp_path / "remote"), tmp_path / "cache")
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "read_range", fake.read_range)
    return fake


def weights(names: set[str]) -> set[str]:
    return {name for name in names if name.endswith(".safetensors")}


def compress(out: Path, *options: str, source: str = "owner/model"):
    return CliRunner().invoke(app, ["compress", source, str(out), "--recipe", "paper", *options])


def test_a_plan_fetches_no_weights(fake, tmp_path):
    save_file({"x": load_file(fake.remote / "model.safetensors")[HEAD]}, fake.remote / "consolidated.safetensors")
    done = compress(tmp_path / "out", "--dry-run")
    assert done.exit_code == 0, done.exception
    local = compress(tmp_path / "out", "--dry-run", source=str(fake.remote))
    rows = [
        [line for line in text.splitlines() if "weights" in line or "disk" in line]
        for text in (done.output, local.output)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 3
    assert not weights(fake.fetched) and "tokenizer.json" in fake.fetched


def test_a_model_by_headers_reads_no_tensor(fake):
    checkpoint, commit = open_by_headers("owner/model")
    whole = Checkpoint(fake.remote)
    assert commit == COMMIT and checkpoint.names == whole.names
    assert [checkpoint.nbytes(name) for name in whole.names] == [whole.nbytes(name) for name in whole.names]
    LayerwiseModel(checkpoint, "cpu")
    for read in (lambda: checkpoint.tensor(HEAD), lambda: checkpoint.expert(0, 1)):
        with pytest.raises(CheckpointError, match="weights of this model were not fetched"):
            read()


def test_a_recipe_that_does_not_fit_is_refused_before_weights_are_fetched(fake, tmp_path):
    done = compress(tmp_path / "out", "--code", "angle8", "--group-size", "128")
    assert "--group-size" in str(done.exception)
    assert not weights(fake.fetched)


def test_a_folder_in_use_and_a_packed_model_are_refused_before_weights_are_fetched(fake, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    assert "is not empty" in str(compress(tmp_path / "out").exception)
    path = fake.remote / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    shutil.rmtree(fake.cache)
    assert "already quantized with AWQ" in str(compress(tmp_path / "other").exception)
    assert not weights(fake.fetched)


def test_the_commit_is_what_provenance_records(fake, tmp_path):
    for name in ("consolidated.safetensors", "model-old.safetensors"):
        shutil.copyfile(fake.remote / "model.safetensors", fake.remote / name)
    done = compress(tmp_path / "out", "--saliency", "magnitude", "--revision", "v1")
    assert done.exit_code == 0, done.exception
    assert weights(fake.fetched) == {"model.safetensors"}
    provenance = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["provenance"]
    assert (provenance["source"], provenance["revision"]) == ("owner/model", COMMIT)
    # The branch may have moved on between two requests.
    assert fake.revisions[0] == "v1" and set(fake.revisions[1:]) <= {COMMIT, None} and COMMIT in fake.revisions
    located = locate("owner/model")
    assert located.commit == COMMIT and located.folder == fake.snapshot


def test_only_the_files_of_the_index_are_fetched(fake):
    tensors = load_file(fake.remote / "model.safetensors")
    (fake.remote / "model.safetensors").unlink()
    save_file(tensors, fake.remote / "part[1].safetensors")
    save_file(tensors, fake.remote / "stale.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "part[1].safetensors")}
    (fake.remote / INDEX).write_text(json.dumps(index))
    assert weights({path.name for path in locate("owner/model").folder.iterdir()}) == {"part[1].safetensors"}


@pytest.mark.parametrize("first", [16, hub.FIRST_BYTES])
def test_headers_of_the_hub_are_those_of_the_files(fake, monkeypatch, first):
    monkeypatch.setattr(hub, "FIRST_BYTES", first)
    checkpoint, _ = open_by_headers("owner/model")
    assert checkpoint._headers == {"model.safetensors": read_header(fake.remote / "model.safetensors")}


def test_a_packed_model_of_the_hub_is_compared_with_its_index(fake, tmp_path):
    compress_pairs(fake.remote, tmp_path / "packed")
    shutil.rmtree(fake.remote)
    shutil.copytree(tmp_path / "packed", fake.remote)
    words = ["inspect", "owner/model", "--quick", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and json.loads(done.stdout)["changed_files"] == [], done.exception
    assert not weights(fake.fetched)
    path = sorted(fake.remote.glob("*.safetensors"))[0]
    tensors = load_file(path)
    save_file({name: tensors[name] for name in reversed(tensors)}, path, metadata={"format": "pt"})
    said = str(CliRunner().invoke(app, words).exception)
    assert path.name in said and not weights(fake.fetched)


class Server(BaseHTTPRequestHandler):
    """Answers with a part of a file, or all of it where `whole` is set."""

    whole = False
    content = bytes(range(256)) * 4

    def do_GET(self) -> None:
        first, last = map(int, self.headers["range"].removeprefix("bytes=").split("-"))
        body = self.content if self.whole else self.content[first : last + 1]
        self.send_response(200 if self.whole else 206)
        if not self.whole:
            self.send_header("content-range", f"bytes {first}-{first + len(body) - 1}/{len(self.content)}")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("whole", [False, True])
def test_a_part_of_a_file(monkeypatch, whole):
    with HTTPServer(("127.0.0.1", 0), type("Handler", (Server,), {"whole": whole})) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(hub, "hf_hub_url", lambda *_, **__: f"http://127.0.0.1:{server.server_port}/file")
        if whole:
            with pytest.raises(OSError, match="does not send parts"):
                hub.read_range("owner/model", COMMIT, "file", 0, 8)
        else:
            assert hub.read_range("owner/model", COMMIT, "file", 3, 9) == (Server.content[3:9], 1024)
            assert hub.read_range("owner/model", COMMIT, "file", 1000, 5000) == (Server.content[1000:], 1024)
        server.shutdown()


def test_a_hub_model_whose_index_lies(fake):
    tensors = load_file(fake.remote / "model.safetensors")
    index = {"weight_map": dict.fromkeys([*tensors, "ghost"], "model.safetensors")}
    (fake.remote / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="tensor ghost is missing"):
        open_by_headers("owner/model")


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, (200_000).to_bytes(8, "little") + b"[" * 200_000])
def test_headers_of_the_hub_that_are_none(fake, content):
    (fake.remote / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"owner/model/model\.safetensors: (is no safetensors|header )") as error:
        open_by_headers("owner/model")
    assert len(str(error.value)) <= 400 and str(error.value).isprintable()


def test_without_a_connection_the_cache_serves(fake, monkeypatch):
    whole = locate("owner/model").folder

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(FakeHub, "list_repo_files", unreachable)
    monkeypatch.setattr(hub, "read_range", unreachable)
    assert locate("owner/model").folder == whole
    assert open_by_headers("owner/model")[0].names == Checkpoint(whole).names
    (whole / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no \*.safetensors files"):
        locate("owner/model")


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (LocalEntryNotFoundError("no\nconnection"), r"hub could not be reached \(no connection\)"),
        (OSError("x" * 5000), "hub could not be reached"),
    ],
)
def test_a_hub_out_of_reach(monkeypatch, raised, message):
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message) as error:
        locate("owner/model")
    assert len(str(error.value)) <= 400


def test_a_revision_that_is_not_there(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RevisionNotFoundError("404", response=httpx.Response(404, request=httpx.Request("GET", "https://hub")))

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="owner/model has no revision v9 on the hub"):
        locate("owner/model", "v9")


@pytest.mark.parametrize("command", ["compress", "baseline", "compare"])
def test_a_folder_has_no_revision(tmp_path, command):
    source, text = build("mixtral", tmp_path / "source"), tmp_path / "text.txt"
    text.write_text("text " * 100)
    rest = {
        "compress": [tmp_path / "out"],
        "baseline": [tmp_path / "out", "--method", "int4"],
        "compare": ["--text", text],
    }
    words = [command, source, *rest[command], "--revision", "no-such-tag"]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert "--revision no-such-tag:" in str(done.exception) and "is a folder here" in str(done.exception)
