"""docs/format.md: its examples hold, and its functions read every word as the code does."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch

from puzzlemoe_vllm.format.codes import CODES, TableCode, TrellisCode
from puzzlemoe_vllm.format.codes.table import SIX_BIT_PLANES
from puzzlemoe_vllm.format.layout import FORMAT_VERSION, layout_digest, parse_config

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "format.md"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the document's examples define; they have run, and answered what it says."""
    text = DOCUMENT.read_text()
    example = doctest.DocTestParser().get_doctest(text, {}, "format.md", str(DOCUMENT), 0)
    failures: list[str] = []
    doctest.DocTestRunner().run(example, out=failures.append, clear_globs=False)
    assert not failures, "".join(failures)
    return example.globs


def test_the_version_is_the_code_s():
    assert DOCUMENT.read_text().startswith(f"# The format on disk\n\nVersion {FORMAT_VERSION}.")


@pytest.mark.parametrize("name", sorted(name for name, code in CODES.items() if not isinstance(code, TrellisCode)))
@pytest.mark.parametrize("position", [0, 1])
def test_every_word_is_read_as_the_code_reads_it(names, name, position):
    code = CODES[name]
    read = torch.tensor([names[name](word, position) for word in range(2**code.bits)])
    if isinstance(code, TableCode):
        assert torch.equal(code.values[position], read)
    else:
        words = torch.arange(2**code.bits).to(torch.int16)
        assert torch.equal(code.decode(words, position), read.to(torch.bfloat16))


def test_planes_are_read_as_the_code_reads_them(names):
    stored = torch.randint(256, (50, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    read = [names["six_bit_words"](bytes(row)) for row in stored.tolist()]
    assert SIX_BIT_PLANES.unpack(stored).tolist() == read


@pytest.mark.parametrize(
    "code", [code for code in CODES.values() if isinstance(code, TrellisCode)], ids=lambda c: c.name
)
def test_tiles_are_read_as_the_code_reads_them(names, code):
    stored = torch.randint(256, (1, 32 * code.bits), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    states = [names["state"](bytes(stored[0].tolist()), code.bits, place) for place in range(256)]
    read = torch.zeros(2, 8, 32)
    for place, state in enumerate(states):
        for position in (0, 1):
            read[position, *names["entry"](place)] = names["trellis"](state, position)
    step = torch.full((8, 1), 0.3, dtype=torch.bfloat16)
    for position in (0, 1):
        assert torch.equal(code.decode(stored, position, step), (read[position] * step.float()).to(torch.bfloat16))


@pytest.mark.parametrize("name", [name for name, code in CODES.items() if isinstance(code, TrellisCode)])
def test_the_document_names_the_trellis_codes(name):
    assert DOCUMENT.read_text().count(f"`{name}`") >= 2


def test_the_layout_s_digest_is_the_code_s(names):
    digest = names["hashlib"].sha256(names["json"].dumps(names["layout"], sort_keys=True).encode()).hexdigest()
    assert layout_digest(parse_config(names["layout"])) == digest
