"""What a user chooses about a compression run."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Recipe(BaseModel):
    """Recorded in the packed model's provenance.

    sparsity: share of the routed experts' memory that goes away, 0.5 (every expert merged) or 0.25 (half of them).
    tau: similarity threshold of Eq. 1, in [0, 1].
    saliency: `wanda` is |W| * ||X||_2 per input column, from calibration; `magnitude` is |W| and needs none.
    """

    model_config = ConfigDict(frozen=True)

    code: Literal["mask16", "angle16", "angle8", "angle6", "mask6"] = "mask16"
    rule: Literal["paper", "least-squares"] = "paper"
    group_size: int | None = None
    sparsity: float = 0.5
    tau: float = Field(0.4, ge=0, le=1)
    pairing: Literal["random"] = "random"
    saliency: Literal["wanda", "magnitude"] = "wanda"
    seed: int = 0

    @field_validator("sparsity")
    @classmethod
    def _known_sparsity(cls, sparsity: float) -> float:
        if sparsity not in (0.5, 0.25):
            raise ValueError(f"sparsity {sparsity} is neither 0.5 nor 0.25")
        return sparsity
