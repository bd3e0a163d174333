"""The packed folder that vLLM reads: found on this machine, and checked before any of it serves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from vllm import envs
from vllm.distributed import get_world_group
from vllm.logger import init_logger

from puzzlemoe_vllm.errors import shown
from puzzlemoe_vllm.format.layout import LayoutError, PuzzleConfig
from puzzlemoe_vllm.format.packed_folder import check_headers
from puzzlemoe_vllm.format.shards import INDEX, check_digests

logger = init_logger(__name__)

VERIFY = "PUZZLEMOE_VERIFY"
"""1: every byte of the shards is compared with their digests, once a node."""


def wants_digests() -> bool:
    """Whether PUZZLEMOE_VERIFY asks for whole digests.  Raises ValueError for another value than 0 or 1."""
    value = os.environ.get(VERIFY, "0")
    if value not in ("0", "1"):
        raise ValueError(
            f"{VERIFY}={value}: set it to 1 to compare every byte of the weights with their digests, or to 0"
        )
    return value == "1"


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights, or says that it should: vLLM's dummy weights need no more than config.json."""
    return (folder / INDEX).exists() or any(folder.glob("*.safetensors"))


def folder_of(model: str, revision: str | None, download_dir: str | None) -> Path:
    """The local folder of a model that vLLM has at hand: a path, or a hub id that it has downloaded.

    Raises LayoutError when the model has no index, and OSError when that cannot be found out.
    """
    if os.path.isdir(model):
        return Path(model)
    index = try_to_load_from_cache(model, INDEX, cache_dir=download_dir, revision=revision)
    if not isinstance(index, str):
        # vLLM leaves the index of a model with a single shard.
        try:
            index = hf_hub_download(model, INDEX, cache_dir=download_dir, revision=revision)
        except EntryNotFoundError:
            raise LayoutError(
                f"{shown(model)} has no {INDEX}: upload or download all files of the packed folder"
            ) from None
    return Path(index).parent


class ServedFiles:
    """Checks each folder that this process loads from, once, and again when its index was replaced."""

    def __init__(self, layout: PuzzleConfig):
        self.layout = layout
        self.model: str | None = None
        self._checked: set[tuple[str, str | None, int]] = set()

    def check_at_start(self, model: str) -> None:
        """The headers of a local folder, before workers start.  Raises LayoutError."""
        self.model = model
        if os.path.isdir(model) and has_weights(Path(model)):
            check_headers(Path(model), self.layout)

    def source(self, config: Any) -> Any:
        """The model config, of vLLM's target or draft, that names this model; a reload may make it name another."""
        candidates = (config.model_config, getattr(config.speculative_config, "draft_model_config", None))
        return next((found for found in candidates if found is not None and found.model == self.model), None)

    def check_while_loading(self, model_config: Any, download_dir: str | None) -> None:
        """Headers, and digests if PUZZLEMOE_VERIFY asks for them, of the model that is being loaded: what comes from a
        hub is here by now.  Raises LayoutError; a warning says so when the files are out of reach."""
        model, revision = model_config.model, model_config.revision
        index = Path(model) / INDEX
        source = (model, revision, index.stat().st_mtime_ns if index.exists() else 0)
        if source in self._checked:
            return
        if self._within_reach(model_config):
            self._check(model, revision, download_dir)
        self._checked.add(source)

    def _within_reach(self, model_config: Any) -> bool:
        model = model_config.model
        if getattr(model_config, "model_weights", "") or (envs.VLLM_USE_MODELSCOPE and not os.path.isdir(model)):
            logger.warning("puzzlemoe: %s is not read from a local folder: its headers were not checked", shown(model))
            return False
        return True

    def _check(self, model: str, revision: str | None, download_dir: str | None) -> None:
        try:
            folder = folder_of(model, revision, download_dir)
        except (OSError, HfHubHTTPError) as error:
            logger.warning("puzzlemoe: headers of %s were not checked: %s", shown(model), shown(error, 200))
            return
        check_headers(folder, self.layout)
        if wants_digests() and get_world_group().local_rank == 0:
            check_digests(folder)
            logger.info("puzzlemoe: every shard of %s is as it was written", shown(folder, 200))
