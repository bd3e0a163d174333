"""A code is one file: nothing else knows its name, and a file that is added is served.

The second half runs compiled where a GPU is, else under Triton's interpreter.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from support.layers import Layer, generator, random_inputs, random_weights
from support.triton_device import DEVICE, GPU, run_interpreted, runs, starts_the_interpreter

from puzzlemoe_offline.words.nearest import fit_least_squares
from puzzlemoe_vllm.backends import cuda, reference
from puzzlemoe_vllm.format import codes

ROOT = Path(__file__).parents[2]
NAMES = re.compile(rf"\b({'|'.join(codes.CODES)})\b")
CHOICES = {"puzzlemoe_offline/recipe.py": "the named recipes, and their fields' help on the command line"}
"""Files that may name a code."""


def strings_of(file: Path) -> list[tuple[int, str]]:
    """Line and text of every string of a file that is not a docstring, or of C++."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        code = "\n".join(line.split("//")[0] for line in text.splitlines())
        return [(code.count("\n", 0, found.start()) + 1, found[0]) for found in re.finditer(r'"[^"\n]*"', code)]
    tree = ast.parse(text)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]


def named_in(file: Path) -> list[int]:
    return [line for line, text in strings_of(file) if NAMES.search(text)]


def test_no_other_file_spells_a_codes_name():
    folders = ("puzzlemoe_vllm", "puzzlemoe_offline", "cuda")
    files = [
        file
        for folder in folders
        for suffix in ("py", "cu", "cuh", "h")
        for file in (ROOT / folder).rglob(f"*.{suffix}")
    ]
    own = ROOT / "puzzlemoe_vllm" / "format" / "codes"
    found = {
        f"{file.relative_to(ROOT)}:{line}"
        for file in files
        if own not in file.parents and str(file.relative_to(ROOT)) not in CHOICES
        for line in named_in(file)
    }
    assert len(files) > 50 and not found


def test_a_name_is_found_where_it_is_spelled(tmp_path):
    file = tmp_path / "backend.py"
    file.write_text('"""Of mask16."""\n\nif code == "mask16":\n    print(f"use angle8, {code}", "mask160")\n')
    assert named_in(file) == [3, 4]
    file = tmp_path / "decode.cuh"
    file.write_text('// "mask16"\nif (!strcmp(name, "angle6")) return;\n')
    assert named_in(file) == [2]


def test_a_codes_file_has_its_name():
    """Or, of a kind that comes in several sizes, the part that all their names begin with."""
    files = {path.stem for path in (ROOT / "puzzlemoe_vllm" / "format" / "codes").glob("*.py")}
    for name, code in codes.CODES.items():
        assert code.name == name and files & {name, name.rstrip("0123456789")}


ADDED = '''
from puzzlemoe_vllm.format.codes.table import BYTES, TableCode

LEVELS = [40 + 5 * level for level in range(16)]


def value_bytes():
    """Four bits of each position: a sign and a level."""
    levels = range(256)
    return [w & 0x80 | LEVELS[2 * (w >> 4 & 7)] for w in levels], [w << 4 & 0x80 | LEVELS[2 * (w & 7)] for w in levels]


CODES = [TableCode("made_up", BYTES, unit_step=2.0, value_bytes=value_bytes())]
'''


@pytest.fixture
def added(tmp_path, monkeypatch) -> codes.PairCode:
    """A code that is a file of another folder."""
    (tmp_path / "made_up.py").write_text(ADDED)
    monkeypatch.setattr(codes, "__path__", [*codes.__path__, str(tmp_path)])
    found = codes.find_codes()
    assert set(found) == {*codes.CODES, "made_up"}
    monkeypatch.setitem(codes.CODES, "made_up", found["made_up"])
    return found["made_up"]


def test_an_added_code_is_fitted_encoded_and_decoded(added):
    torch.manual_seed(0)
    weights = torch.randn(16, 128).bfloat16(), torch.randn(16, 128).bfloat16()
    packed = fit_least_squares(added, weights, (torch.ones(128), torch.ones(128)), 64)
    assert packed.words.shape == added.words_shape(16, 128) and packed.steps.shape == (16, 2)
    for position, weight in enumerate(weights):
        decoded = added.decode(packed.words, position, packed.steps).float()
        assert (decoded - weight).norm() < 0.3 * weight.norm()
        assert ((decoded == 0) | (decoded.sign() == weight.sign())).all()


@starts_the_interpreter
def test_under_the_interpreter():
    run_interpreted(__file__, "added_code_is_served")


@runs
@pytest.mark.parametrize("tokens", [3, 40])
def test_an_added_code_is_served_by_every_backend(added, tokens):
    from puzzlemoe_vllm.backends import triton

    layer = Layer(pairs=2, dense=1, top_k=2, hidden=64, intermediate=64, code=added.name, group_size=32)
    draw = generator(tokens, DEVICE)
    weights, inputs = random_weights(layer, draw), random_inputs(layer, tokens, draw)
    expected = reference.fused_experts(inputs[0].double(), *inputs[1:], weights)
    outs = [triton.fused_experts(*inputs, weights)]
    if GPU and cuda.unavailable() is None:
        cuda.prepare(weights)
        outs.append(cuda.fused_experts(*inputs, weights))
    for out in outs:
        assert expected.any() and (out.double() - expected).norm() < 2e-2 * expected.norm()
