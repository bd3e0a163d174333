"""Names for what transformers imports of torchvision, where that is not installed.

vLLM's class of Qwen3.5 imports transformers' image processors, and they torchvision, to serve texts as well.  Every
module and name is there; whatever is called raises.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any, NoReturn

__path__: list[str] = []
__version__ = "0"


class _Nothing(type):
    """The class of a name that may be imported, and have attributes."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"

    def __call__(cls, *arguments: Any, **options: Any) -> NoReturn:
        raise RuntimeError(f"{cls.__name__} was called, and torchvision is not installed")


class _Module(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(f"{self.__name__}.{name}", (), {})


class _Modules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module below torchvision."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        below = name.startswith(f"{__name__}.")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if below else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.append(_Modules())
