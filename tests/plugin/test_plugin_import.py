"""The plugin where vLLM is not installed."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from support.without_vllm import BLOCK_VLLM, run

import puzzlemoe_vllm


@pytest.mark.without_vllm
def test_format_and_kernels_work_without_vllm():
    done = run(
        BLOCK_VLLM
        + """
import torch, puzzlemoe_vllm, puzzlemoe_vllm.ops
from puzzlemoe_vllm.format import codes, layout, shards
assert "vllm" not in sys.modules
assert not torch.cuda.is_initialized()
words = torch.tensor([[0x3F80 - (112 << 7) | 0x3000]], dtype=torch.int32).short()
print(float(codes.get_code("mask16").decode(words, 1)), layout.parse_config({"clusters": {"0": [0, 0]}}).format_version)
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1.0", "2"]


@pytest.mark.without_vllm
def test_registering_without_vllm_names_what_is_missing():
    done = run(BLOCK_VLLM + "import puzzlemoe_vllm\npuzzlemoe_vllm.register()")
    assert done.returncode != 0
    assert "No module named 'vllm'" in done.stderr


@pytest.mark.without_vllm
@pytest.mark.parametrize(
    ("version", "warns"),
    [("0.26.0", 0), ("0.32.0+cpu", 0), ("0.33.1", 0), ("0.25.1", 1), ("0.34.0rc1", 1), ("1.0", 1), ("dev", 1)],
)
def test_other_releases_of_vllm_are_warned_of_once(monkeypatch, caplog, version, warns):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
    monkeypatch.setitem(sys.modules, "puzzlemoe_vllm.config", SimpleNamespace())
    puzzlemoe_vllm._warn_of_untested.cache_clear()
    puzzlemoe_vllm.register()
    puzzlemoe_vllm.register()
    assert len(caplog.records) == warns
    assert all(f"vLLM {version} is not among" in text and "0.26 to 0.33" in text for text in caplog.messages)
