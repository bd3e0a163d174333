"""On a GPU, too, a run writes the same bytes every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models import build
from support.triton_device import on_a_gpu

from puzzlemoe_offline.calibration.text import Calibration
from puzzlemoe_offline.methods.pairs import PairMethod
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.run.job import Job
from puzzlemoe_offline.run.runner import run


def shards(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


@on_a_gpu
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2"])
@pytest.mark.parametrize(
    "options", [{"code": "angle8", "compensate": True, "pairing": "search"}, {"code": "trellis3"}, {}]
)
def test_runs_write_the_same_bytes(family, options, tmp_path, monkeypatch):
    source = build(family, tmp_path / "source")
    # A few windows at a time, so that there are batches to add up.
    monkeypatch.setattr("puzzlemoe_offline.model.layerwise.ACTIVATION_BYTES", 1 << 20)
    tokens = torch.randint(0, 64, (24, 96), generator=torch.Generator().manual_seed(0))
    job = Job(LayerwiseModel(Checkpoint(source), "cuda"), PairMethod(PairRecipe(**options)), "source", tokens=2304)
    for number in range(2):
        run(job, Calibration(tokens, "random tokens"), tmp_path / str(number))
    assert shards(tmp_path / "0") == shards(tmp_path / "1")
