"""A checkpoint's tokenizer, as its tokenizer.json describes it."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from puzzlemoe_offline.model.hub import small_files
from puzzlemoe_offline.model.weight_files import CheckpointError
from puzzlemoe_vllm.errors import UserError, shown
from puzzlemoe_vllm.format.files import read_json_object

CONFIG = "tokenizer_config.json"

LARGEST_ID = 10_000_000
"""Of a token."""

FAITHFUL = "PreTrainedTokenizerFast"
"""The class, as files name it, that does what tokenizer.json says and nothing else."""


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """A model folder's tokenizer.  Raises CheckpointError when it cannot be loaded, UserError as `small_files` does."""
    small_files(folder)
    # A checkpoint's own code is never run; a tokenizer that needs it cannot be used here.
    try:
        tokenizer = _by_its_class(folder)
        if _class_misreads(folder, tokenizer):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except UserError:
        raise
    except Exception as error:  # transformers and tokenizers raise whatever their parsers raise
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{shown(folder, 200)}: its tokenizer could not be loaded ({shown(reason)}): fetch its tokenizer "
            "files again"
        ) from None
    # Where there are no tokenizer files, transformers may make up a tokenizer that knows special tokens only.
    if len(tokenizer) <= len(tokenizer.get_added_vocab()):
        raise CheckpointError(
            f"{shown(folder, 200)}: its tokenizer has no vocabulary: the download or the copy is incomplete"
        )
    return tokenizer


def mended_config(folder: Path) -> dict[str, str]:
    """The text of tokenizer_config.json by its name, with a class that reads tokenizer.json as it is, where the class
    that it names does not; else nothing.

    A server would otherwise misread every prompt of the packed model, as of its source.  Raises UserError as
    `small_files` does.
    """
    small_files(folder)
    if not (folder / CONFIG).exists():
        return {}
    try:
        if not _class_misreads(folder, _by_its_class(folder)):
            return {}
    except Exception:  # packing needs no tokenizer; what loads the model will say what is wrong with it
        return {}
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | {"tokenizer_class": FAITHFUL}
    return {CONFIG: json.dumps(config, indent=2, ensure_ascii=False) + "\n"}


def _by_its_class(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers loads it."""
    if (folder / "tokenizer.json").exists():
        _check_ids(folder / "tokenizer.json")
    options = {}
    if (folder / "config.json").exists():
        model_type = read_json_object(folder / "config.json").get("model_type")
        if model_type not in CONFIG_MAPPING:
            # transformers would read what it does not know, such as a rope_scaling, and fail over it.
            options["config"] = PreTrainedConfig()
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)


def _check_ids(path: Path) -> None:
    """Raises CheckpointError for a token id that no model has: the tokenizers library goes through all ids below it."""
    model = read_json_object(path).get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    for token, number in vocabulary.items() if isinstance(vocabulary, dict) else ():
        if isinstance(number, int) and number > LARGEST_ID:
            raise CheckpointError(f"{shown(path, 200)}: token {shown(token, 40)} has the id {shown(number, 40)}")


def _class_misreads(folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer loses the spaces of a text that its tokenizer.json keeps.

    DeepSeek's first models name LlamaTokenizerFast for a byte-level tokenizer.json; transformers 5 puts Llama's rules
    in its place (huggingface/transformers#45488), and makes exceptions only for later models.
    """
    if _keeps_spaces(tokenizer) or not (folder / "tokenizer.json").exists():
        return False
    return _keeps_spaces(PreTrainedTokenizerFast.from_pretrained(folder))


def _keeps_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    text = "a b\nc"
    ids = tokenizer(text)["input_ids"]
    return text in tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
