"""What a user chooses about a compression run."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from puzzlemoe_vllm.format.codes import get_code


class Recipe(BaseModel):
    """Recorded in the packed model's provenance.

    code: what a pair's word holds (`puzzlemoe_vllm.format.codes`).
    rule: how a mask16 word is chosen: the `paper`'s threshold and saliency, or `least-squares`, weighted with each
    expert's squared input norms, which the other codes always use.
    compensate: push each expert's error in a column into its later columns; needs calibration and a least-squares fit.
    group_size: input columns that share a step, in codes with steps; None for the largest that fits the model.
    sparsity: share of the routed experts' memory that goes away, 0.5 (every expert merged) or 0.25 (half of them).
    tau: similarity threshold of Eq. 1, in [0, 1].
    saliency: `wanda` is |W| * ||X||_2 per input column, from calibration; `magnitude` is |W| and needs none.
    """

    model_config = ConfigDict(frozen=True)

    code: Literal["mask16", "angle16", "angle8", "angle6", "mask6"] = "mask16"
    rule: Literal["paper", "least-squares"] = "paper"
    compensate: bool = False
    group_size: int | None = None
    sparsity: float = 0.5
    tau: float = Field(0.4, ge=0, le=1)
    pairing: Literal["random"] = "random"
    saliency: Literal["wanda", "magnitude"] = "wanda"
    seed: int = 0

    @property
    def is_paper(self) -> bool:
        """Whether words are chosen by the paper's rule."""
        return self.code == "mask16" and self.rule == "paper"

    @model_validator(mode="after")
    def _choices_fit_together(self) -> Recipe:
        if self.group_size is not None:
            get_code(self.code).check_group_size(self.group_size)
        if self.compensate and (self.saliency == "magnitude" or self.is_paper):
            raise ValueError("compensation needs calibration (wanda saliency) and a least-squares rule")
        return self

    @field_validator("sparsity")
    @classmethod
    def _known_sparsity(cls, sparsity: float) -> float:
        if sparsity not in (0.5, 0.25):
            raise ValueError(f"sparsity {sparsity} is neither 0.5 nor 0.25")
        return sparsity
