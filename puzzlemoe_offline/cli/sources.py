"""A run's source: checked from its headers first, fetched when nothing stands against the run."""

from __future__ import annotations

from dataclasses import replace

from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.hub import locate
from puzzlemoe_offline.model.layerwise import LayerwiseModel
from puzzlemoe_offline.run.job import Job


def with_weights(job: Job, source: str) -> Job:
    """The same job with the model's weights at hand: of a hub model they are fetched, at the commit that was checked.

    Raises UserError as `locate` and `Checkpoint` do.
    """
    if job.checkpoint.has_weights:
        return job
    checkpoint = Checkpoint(locate(source, job.revision).folder)
    return replace(job, model=LayerwiseModel(checkpoint, job.device))
