"""docs/format.md: its examples hold, and its functions read every word as the code does."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch

from puzzlemoe_vllm.format.codes import CODES, TableCode
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


@pytest.mark.parametrize("name", sorted(CODES))
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


def test_the_layout_s_digest_is_the_code_s(names):
    digest = names["hashlib"].sha256(names["json"].dumps(names["layout"], sort_keys=True).encode()).hexdigest()
    assert layout_digest(parse_config(names["layout"])) == digest
