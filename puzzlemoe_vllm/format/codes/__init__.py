"""What a pair word means: one word holds one weight of two experts.

A code knows bits only.  Choosing *which* state, signs and magnitude to store is the offline tool's work
(`puzzlemoe_offline.words`); choosing a memory order for a kernel is a backend's work.

Every code is addressed by position: position 0 is the pair's leader (the even expert id), position 1 its partner.

Each kind of code is one module of this folder and is found there: what is not `base` or `table` has `CODES`.
"""

from __future__ import annotations

import importlib
import pkgutil

from puzzlemoe_vllm.format.codes.base import GROUP_SIZES, Decoder, PairCode, UnencodableWeight
from puzzlemoe_vllm.format.codes.table import TableCode
from puzzlemoe_vllm.format.codes.trellis import TrellisCode

__all__ = [
    "CODES",
    "GROUP_SIZES",
    "Decoder",
    "PairCode",
    "TableCode",
    "TrellisCode",
    "UnencodableWeight",
    "find_codes",
    "get_code",
]


def find_codes() -> dict[str, PairCode]:
    """The codes of this folder by name."""
    names = {module.name for module in pkgutil.iter_modules(__path__)} - {"base", "table"}
    modules = [importlib.import_module(f"{__name__}.{name}") for name in sorted(names)]
    return {code.name: code for module in modules for code in module.CODES}


CODES: dict[str, PairCode] = find_codes()


def get_code(name: str) -> PairCode:
    """The code of that name.  Raises ValueError naming the known ones."""
    if name not in CODES:
        raise ValueError(f"unknown pair-word code {name!r}; this version knows {', '.join(sorted(CODES))}")
    return CODES[name]
