"""What a baseline does to the experts of one layer, and what it needs to know for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from puzzlemoe_offline.calibration.statistics import ExpertStatistics
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import Expert

Needs = Literal["nothing", "norms", "moments", "outputs"]
"""What a method takes from calibration: nothing; token counts and column norms; these and second moments; these and the
mean output of every expert."""


class BaselineError(ValueError):
    """A model that a baseline cannot be applied to; the text names the option and the way out."""


@dataclass(frozen=True)
class SourceLayer:
    """One layer's routed experts as the source has them, by expert id, and what calibration saw of them.

    statistics: None when the method needs nothing; mean_outputs: float32 [E, H], None unless the method needs outputs.
    """

    index: int
    experts: list[Expert]
    statistics: ExpertStatistics | None
    mean_outputs: Tensor | None


@dataclass(frozen=True)
class NewLayer:
    """What a baseline makes of a layer: weights in bf16, of the source's experts `order`, whose router rows stay."""

    order: list[int]
    experts: list[Expert]


class Method(Protocol):
    """A way to make the routed experts smaller, applied to one layer at a time."""

    @property
    def needs(self) -> Needs:
        """What it takes from calibration."""

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises BaselineError when the method does not fit the model."""

    def bits_per_weight(self, checkpoint: Checkpoint) -> float:
        """Bits that one weight of a routed expert would take in the method's own storage, scales and indices included,
        per weight of the source."""

    def apply(self, layer: SourceLayer) -> NewLayer:
        """The layer's new experts."""
