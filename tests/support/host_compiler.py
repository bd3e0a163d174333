"""The compiler with which CUDA sources are built for the host."""

from __future__ import annotations

import shutil

import pytest

COMPILER = shutil.which("g++") or shutil.which("clang++")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
