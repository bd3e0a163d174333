"""On a GPU, too, a run writes the same bytes every time, and with several GPUs those of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models import build
from support.triton_device import on_a_gpu

from puzzlemoe_offline.calibration.text import Calibration
from puzzlemoe_offline.methods import BASELINES
from puzzlemoe_offline.methods.mergemoe import MergeMoe
from puzzlemoe_offline.methods.pairs import PairMethod
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.recipe import ClusterRecipe, PairRecipe
from puzzlemoe_offline.run import runner
from puzzlemoe_offline.run.devices import other_gpus
from puzzlemoe_offline.run.job import Job

METHODS = {
    "angle8": PairMethod(PairRecipe(code="angle8", compensate=True, pairing="search")),
    "trellis3": PairMethod(PairRecipe(code="trellis3")),
    "mask16": PairMethod(PairRecipe()),
    "mergemoe": MergeMoe(ClusterRecipe(clusters=2)),
    "gptq-int3": BASELINES["gptq-int3"],
}


def shards(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


@on_a_gpu
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_bytes_depend_on_no_chance_and_on_no_number_of_gpus(family, method, tmp_path, monkeypatch):
    source = build(family, tmp_path / "source")
    # A few windows at a time, so that there are batches to add up.
    monkeypatch.setattr("puzzlemoe_offline.model.layerwise.ACTIVATION_BYTES", 1 << 20)
    tokens = torch.randint(0, 64, (24, 96), generator=torch.Generator().manual_seed(0))
    job = Job(LayerwiseModel(Checkpoint(source), "cuda"), method, "source", tokens=2304)
    every = other_gpus(torch.device("cuda"))
    written = []
    for number, others in enumerate([[], [], *(every[: count + 1] for count in range(len(every)))]):
        monkeypatch.setattr(runner, "other_gpus", lambda device, others=others: others)
        report = runner.run(job, Calibration(tokens, "random tokens"), tmp_path / str(number))
        assert report.devices == 1 + len(others)
        written.append(shards(tmp_path / str(number)))
    assert all(found == written[0] for found in written)
