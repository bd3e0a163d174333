"""Finding a model: a folder here, or a hub id."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from puzzlemoe_offline.model.checkpoint import CheckpointError


def locate(source: str, revision: str | None = None) -> Path:
    """The local folder of a model: a path, or a hub id (fetched into the hub cache).

    Raises CheckpointError when it is neither.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=["*.safetensors", *SMALL_FILES]))
    except GatedRepoError:
        raise CheckpointError(
            f"{source}: the hub gives this model only to those who accepted its terms on its page: do that, then "
            "`hf auth login`"
        ) from None
    except (HFValidationError, RepositoryNotFoundError):
        raise CheckpointError(f"{source}: neither a folder here nor a model id on the hub") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{source}: no such folder, and the hub could not be reached ({error})") from None


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
