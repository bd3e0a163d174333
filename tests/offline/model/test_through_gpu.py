"""Hidden states that go through a GPU batch by batch are what each batch alone comes to, however copies and work
overlap."""

from __future__ import annotations

import pytest
import torch
from support.triton_device import on_a_gpu

from puzzlemoe_offline.model.through_gpu import through_gpu


@on_a_gpu
@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in place"])
@pytest.mark.parametrize("work_rounds", [0, 40], ids=["copies take longer", "work takes longer"])
def test_every_batch_comes_back_as_it_is_alone(in_place, work_rounds):
    matrix = torch.nn.init.orthogonal_(torch.empty(1024, 1024, device="cuda")).bfloat16()

    def work(batch: torch.Tensor) -> torch.Tensor:
        for _ in range(work_rounds):
            batch = batch @ matrix
        return batch + 1

    states = torch.randn(22, 512, 1024, dtype=torch.bfloat16)
    expected = torch.cat([work(batch.cuda()).cpu() for batch in states.split(4)])
    for _ in range(8):  # in memory that was used before
        before = states.pin_memory()
        after = before if in_place else torch.full_like(states, torch.nan).pin_memory()
        through_gpu(work, before.split(4), after.split(4), "cuda")
        assert torch.equal(after, expected)
        assert in_place or torch.equal(before, states)
