"""One pass over a tensor finds what `isfinite` finds, wherever it stands."""

import pytest
import torch

from puzzlemoe_offline.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("size", [1, 7, 16, 33, 127, 4097, 70_001])
def test_one_value_is_found_at_every_place(dtype, value, size):
    tensor = torch.randn(size).to(dtype)
    assert all_finite(tensor)
    for place in {0, 1, size // 3, size // 2, size - 2, size - 1} & set(range(size)):
        one = tensor.clone()
        one[place] = float(value)
        assert not all_finite(one)
        assert not all_finite(one[None].expand(3, size).t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_largest_numbers_are_finite(dtype):
    largest = torch.finfo(dtype).max
    assert all_finite(torch.tensor([[largest, -largest], [0.0, 1.0]], dtype=dtype))


def test_no_values_are_finite():
    assert all_finite(torch.empty(0, 4, dtype=torch.bfloat16))
