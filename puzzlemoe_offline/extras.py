"""What the offline tool needs beyond the packages that serving needs: the extras of pyproject.toml.

Imports nothing but the standard library, so that it can say what is missing.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from puzzlemoe_vllm.errors import UserError

COMPRESS = (
    "accelerate",
    "datasets",
    "httpx",
    "huggingface_hub",
    "pyarrow",
    "rich",
    "rustworkx",
    "transformers",
    "typer",
)
COMPARE = ("matplotlib", "scipy")
MODULES = {"compress": COMPRESS, "compare": COMPARE}
"""Modules by the extra that installs them; `compare` includes `compress`."""


class MissingExtra(UserError):
    """Packages of an extra are not installed; the text is the command that installs them."""


def require(extra: Literal["compress", "compare"]) -> None:
    """Raises MissingExtra unless all modules of the extra can be imported."""
    if missing := [name for name in MODULES[extra] if find_spec(name) is None]:
        raise MissingExtra(f'{", ".join(missing)} not installed here: pip install "puzzlemoe-vllm[{extra}]"')
