"""Finding a model: a folder here, or a hub id; its weights are fetched only when they are asked for."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import HfApi, constants, get_session, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.weight_files import CheckpointError, check_places, files_without_index
from puzzlemoe_vllm.errors import shown
from puzzlemoe_vllm.format.files import open_regular
from puzzlemoe_vllm.format.headers import LFS_POINTER, ShardHeader, header_length, parse_header, read_header
from puzzlemoe_vllm.format.shards import INDEX, read_weight_map

SMALL_FILES = (
    "*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.py",
    "*.model",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
    "*.tiktoken",
)
"""What a model folder holds beside its weights: configuration, tokenizer, chat templates, licence."""

FIRST_BYTES = 100_000
"""Of a file, asked for at once: most headers are shorter."""

NOT_COPIED = ("config.json", "adapter_config.json", "quantize_config.json", "quant_config.json")
"""Small files that would be wrong beside other weights; so would an index."""


@dataclass(frozen=True)
class Located:
    """Where a model lies, and of a hub model the commit."""

    folder: Path
    commit: str | None = None


def locate(source: str, revision: str | None = None) -> Located:
    """A model, all its files: a folder here, or a hub id, fetched into the hub cache.

    Raises CheckpointError when it is neither, or cannot be fetched, and LayoutError as `small_files` does.
    """
    found = _without_weights(source, revision)
    if found.commit:
        patterns = [glob.escape(file) for file in _weight_files(source, found)]
        _fetch(source, found.commit, patterns)
    return found


def open_by_headers(source: str, revision: str | None = None) -> tuple[Checkpoint, str | None]:
    """A model as far as its small files and headers tell, and of a hub model the commit.

    Of a hub model no weights are fetched, and no tensor of it can be read.  Raises UserError as `locate` and
    `Checkpoint` do.
    """
    found = _without_weights(source, revision)
    if found.commit is None:
        return Checkpoint(found.folder), None
    files = _weight_files(source, found)
    with ThreadPoolExecutor(8) as pool:
        headers = dict(zip(files, pool.map(lambda file: _header(source, found, file), files), strict=True))
    index = found.folder / INDEX
    check_places(found.folder, headers, read_weight_map(found.folder) if index.exists() else None)
    return Checkpoint(found.folder, headers), found.commit


def small_files(folder: Path) -> list[Path]:
    """The files beside the weights that belong to another model made of this one: tokenizer, templates, licence.

    Raises LayoutError for one that is a link out of the folder or no regular file, CheckpointError for a git-lfs
    pointer; files that are not to be copied are looked at, too, since loaders read them.
    """
    files = []
    for path in sorted({path for pattern in SMALL_FILES for path in folder.glob(pattern)}):
        if path.is_dir() and path.name.startswith(("LICENSE", "NOTICE")):
            continue
        with open_regular(path, folder) as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise CheckpointError(f"{shown(path, 200)} is a git-lfs pointer, not the file: run git lfs pull")
        if path.name not in NOT_COPIED and not path.name.endswith(".index.json"):
            files.append(path)
    return files


def _without_weights(source: str, revision: str | None) -> Located:
    folder = Path(source)
    try:
        here = folder.is_dir()
    except (OSError, ValueError):
        here = False
    if here:
        if revision is not None:
            raise CheckpointError(f"--revision {shown(revision)}: {shown(source, 200)} is a folder here, drop it")
        found = Located(folder)
    else:
        folder = _fetch(source, revision, list(SMALL_FILES))
        if not re.fullmatch("[0-9a-f]{40,64}", folder.name):
            raise CheckpointError(f"{shown(source)}: the hub cache has it under no commit: {shown(folder, 200)}")
        found = Located(folder, folder.name)
    small_files(found.folder)
    return found


def _weight_files(source: str, found: Located) -> list[str]:
    """Names of the files that make up a hub model's weights."""
    assert found.commit
    if (found.folder / INDEX).exists():
        return sorted(set(read_weight_map(found.folder).values()))
    try:
        names: Iterable[str] = HfApi().list_repo_files(source, revision=found.commit)
    except (HfHubHTTPError, httpx.HTTPError, OSError):  # not reached: what the cache has may be all
        names = [path.name for path in found.folder.iterdir()]
    return files_without_index(found.folder, names)


def _header(source: str, found: Located, file: str) -> ShardHeader:
    """The header of a hub model's file: of a fetched one, or by a request of some kilobytes."""
    if (found.folder / file).exists():
        return read_header(found.folder / file)
    assert found.commit
    path = Path(source) / file
    try:
        start, size = read_range(source, found.commit, file, 0, FIRST_BYTES)
        end = 8 + header_length(path, start, size)
        if end > len(start):
            start, _ = read_range(source, found.commit, file, 0, end)
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise CheckpointError(
            f"{shown(source)}: {shown(file)} could not be fetched ({shown(_one_line(error))})"
        ) from None
    return parse_header(path, start[8:end], size)


def read_range(source: str, commit: str, file: str, first: int, end: int) -> tuple[bytes, int]:
    """Bytes `first` to `end` of a hub model's file, or as many as there are, and the bytes of all of it.

    Raises HfHubHTTPError, httpx.HTTPError, and OSError for an answer that is no part of a file.
    """
    headers = build_hf_headers() | {"range": f"bytes={first}-{end - 1}"}
    url = hf_hub_url(source, file, revision=commit)
    answer = get_session().get(url, headers=headers, timeout=constants.DEFAULT_REQUEST_TIMEOUT)
    hf_raise_for_status(answer)
    whole = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("content-range", ""))
    if whole is None:
        raise OSError("the server does not send parts of files")
    return answer.content, int(whole[1])


def _fetch(source: str, revision: str | None, patterns: list[str]) -> Path:
    """The snapshot of a hub model that has the files of these names."""
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise CheckpointError(
            f"{shown(source)}: the hub gives this model only to those who accepted its terms on its page: do that, "
            "then `hf auth login`"
        ) from None
    except (HFValidationError, RepositoryNotFoundError):
        raise CheckpointError(f"{shown(source, 200)}: neither a folder here nor a model id on the hub") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{shown(source)} has no revision {shown(revision)} on the hub") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        raise CheckpointError(
            f"{shown(source)}: no such folder, and the hub could not be reached ({shown(_one_line(error), 150)})"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(f"{error}".split())
