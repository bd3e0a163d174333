"""`puzzlemoe unpack`: a packed model's reconstructed weights as an ordinary checkpoint."""

from __future__ import annotations

from puzzlemoe_offline.cli.options import Model, OutFolder, ResumeOption
from puzzlemoe_offline.cli.terminal import console, layer_progress, print_finished
from puzzlemoe_offline.methods.unpack import Unpack
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.hub import locate
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.run.job import Job
from puzzlemoe_offline.run.runner import check, run


def unpack_command(model: Model, out: OutFolder, resume: ResumeOption = False) -> None:
    """Write an ordinary dense bf16 checkpoint of a packed model's reconstructed weights."""
    packed = LayerwiseModel(Checkpoint(locate(model).folder), "cpu")
    job = Job(packed, Unpack(), packed.checkpoint.folder.resolve().name)
    check(job, out, resume)
    with layer_progress("unpacking", packed.checkpoint.layers) as advance:
        report = run(job, None, out, resume, advance)
    if report is None:
        print_finished(out)
    console.print(f"dense model written to {out}", markup=False, soft_wrap=True)
