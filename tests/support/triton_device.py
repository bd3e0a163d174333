"""Where tests of Triton kernels run: on a GPU, else under Triton's interpreter in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU and not INTERPRETED else "cpu"
runs = pytest.mark.skipif(not (GPU or INTERPRETED), reason="no GPU: test_under_the_interpreter runs it")
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
starts_the_interpreter = pytest.mark.skipif(GPU or INTERPRETED, reason="the tests of this file run here themselves")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")


def run_interpreted(file: str, only: str = "") -> None:
    """Runs a file's tests whose name contains `only` under the interpreter, which must be chosen before anything
    imports triton."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", only, file]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def machine_code(
    kernel: Any, types: Mapping[str, Any], constants: Mapping[str, Any], capability: int, **options: int
) -> bytes:
    """The kernel compiled for a GPU, which needs none: what the interpreter lets pass the compiler may not.

    types: of the parameters that are not among `constants`; of a named tuple's fields in such a tuple, None for one
    that is None.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    places: dict[tuple[int, ...], Any] = {(names.index(name),): constants[name] for name in constants if name in names}
    for name, fields in signature.items():
        if isinstance(fields, tuple):
            missing = {field: "constexpr" for field, kind in fields._asdict().items() if kind is None}
            places |= {(names.index(name), fields._fields.index(field)): None for field in missing}
            signature[name] = fields._replace(**missing)
    return compile(ASTSource(kernel, signature, places), GPUTarget("cuda", capability, 32), options).asm["cubin"]
