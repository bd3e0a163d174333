"""Adds the CUDA library to the build: see pyproject.toml for all else.

PUZZLEMOE_BUILD_CUDA=1 requires it, 0 leaves it out; unset, it is built where nvcc is found.  A package without the
library works: the plugin then uses its Triton kernels and says so.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LIBRARY = "libpuzzlemoe_cuda.so"


def cuda_build() -> ModuleType:
    """The module cuda/build.py."""
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "cuda" / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wanted() -> bool:
    """Whether this build includes the CUDA library.  Raises FileNotFoundError when it must and nvcc is missing."""
    choice = os.environ.get("PUZZLEMOE_BUILD_CUDA")
    if choice == "0":
        return False
    try:
        cuda_build().find_nvcc()
    except FileNotFoundError as error:
        if choice == "1":
            raise
        print(f"building without the CUDA library: {error}", file=sys.stderr)
        return False
    return True


class BuildWithLibrary(build_py):
    """Compiles the library beside the plugin's modules."""

    def run(self) -> None:
        super().run()
        if wanted():
            package = ROOT / "puzzlemoe_vllm" if self.editable_mode else Path(self.build_lib, "puzzlemoe_vllm")
            cuda_build().build_library(package / LIBRARY)


class WheelForAnyPython(bdist_wheel):
    """With the library, a wheel for this platform but any Python: nothing in it links against Python or torch."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not wanted()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": WheelForAnyPython})
