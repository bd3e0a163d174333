"""`puzzlemoe baseline`: what another method makes of the experts, as an ordinary checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from puzzlemoe_offline.cli.options import (
    DEFAULT_DEVICE,
    DEFAULT_SAMPLES,
    CalibrationOption,
    ColumnOption,
    DeviceOption,
    OptionError,
    OutFolder,
    ResumeOption,
    RevisionOption,
    SamplesOption,
    SourceModel,
    WindowOption,
)
from puzzlemoe_offline.cli.sources import with_weights
from puzzlemoe_offline.cli.terminal import console, layer_progress, print_finished
from puzzlemoe_offline.cli.texts import CalibrationText
from puzzlemoe_offline.methods import BASELINES
from puzzlemoe_offline.model.hub import open_by_headers
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.run.job import Job
from puzzlemoe_offline.run.runner import check, run


def baseline_command(
    source: SourceModel,
    out: OutFolder,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(BASELINES)}.")],
    calibration: CalibrationOption = None,
    column: ColumnOption = None,
    samples: SamplesOption = DEFAULT_SAMPLES,
    sequence_length: WindowOption = None,
    device: DeviceOption = DEFAULT_DEVICE,
    revision: RevisionOption = None,
    resume: ResumeOption = False,
) -> None:
    """Write an ordinary bf16 checkpoint of what another compression method makes of the experts, for comparison."""
    if method not in BASELINES:
        raise OptionError(f"--method {method}: unknown; choose one of {', '.join(BASELINES)}")
    chosen = BASELINES[method]
    planned, commit = open_by_headers(source, revision)
    name = planned.folder.resolve().name if commit is None else source
    text = CalibrationText.checked(planned, calibration, column, samples, sequence_length)
    job = Job(LayerwiseModel(planned, device.usable()), chosen, name, commit, text.tokens if chosen.passes else 0)
    check(job, out, resume)
    job = with_weights(job, source)
    data = text.read(job.checkpoint.folder) if chosen.passes else None
    with layer_progress(method, job.checkpoint.layers) as advance:
        report = run(job, data, out, resume, advance)
    if report is None:
        print_finished(out)
    console.print(
        f"dense model written to {out}; {method} itself would store {chosen.bits_per_weight(job.checkpoint):.3f} "
        "bits per expert weight",
        markup=False,
        soft_wrap=True,
    )
