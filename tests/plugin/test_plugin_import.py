"""The plugin where vLLM is not installed."""

from __future__ import annotations

import pytest
from support.without_vllm import BLOCK_VLLM, run


@pytest.mark.without_vllm
def test_format_and_kernels_work_without_vllm():
    done = run(
        BLOCK_VLLM
        + """
import torch, puzzlemoe_vllm, puzzlemoe_vllm.ops
from puzzlemoe_vllm.format import codes, layout
assert "vllm" not in sys.modules
assert not torch.cuda.is_initialized()
words = torch.tensor([[0x3F80 - (112 << 7) | 0x3000]], dtype=torch.int32).short()
print(float(codes.get_code("mask16").decode(words, 1)), layout.parse_config({"code": "mask16"}).format_version)
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1.0", "1"]


@pytest.mark.without_vllm
def test_registering_without_vllm_names_what_is_missing():
    done = run(BLOCK_VLLM + "import puzzlemoe_vllm\npuzzlemoe_vllm.register()")
    assert done.returncode != 0
    assert "No module named 'vllm'" in done.stderr
