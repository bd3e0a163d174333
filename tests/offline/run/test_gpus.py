"""On a GPU a run writes the same bytes every time, and with several GPUs those of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models import build
from support.triton_device import on_a_gpu

from puzzlemoe_offline.calibration import passes, statistics
from puzzlemoe_offline.calibration.text import Calibration
from puzzlemoe_offline.methods import pairs
from puzzlemoe_offline.methods.pairs import PairMethod
from puzzlemoe_offline.model import layer_experts
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.run.job import Job
from puzzlemoe_offline.run.runner import run


def share(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has runs use so many GPUs."""
    for module in (layer_experts, passes, pairs, statistics):
        monkeypatch.setattr(module, "sharing", lambda device: [torch.device("cuda", i) for i in range(devices)])


def shards(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


@on_a_gpu
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2"])
@pytest.mark.parametrize("options", [{"code": "angle8", "compensate": True, "pairing": "search"}, {}])
def test_bytes_depend_on_no_chance_and_on_no_number_of_gpus(family, options, tmp_path, monkeypatch):
    source = build(family, tmp_path / "source")
    model = LayerwiseModel(Checkpoint(source), "cuda")
    tokens = torch.randint(0, 64, (24, 96), generator=torch.Generator().manual_seed(0))
    job = Job(model, PairMethod(PairRecipe(**options)), "source", tokens=tokens.numel())
    # A few windows at a time, so that there are batches to share.
    monkeypatch.setattr("puzzlemoe_offline.model.layerwise.ACTIVATION_BYTES", 1 << 20)
    counts = [1, 1, *range(2, torch.cuda.device_count() + 1)]
    written = []
    for number, count in enumerate(counts):
        share(count, monkeypatch)
        run(job, Calibration(tokens, "random tokens"), tmp_path / str(number))
        written.append(shards(tmp_path / str(number)))
    assert all(found == written[0] for found in written)
