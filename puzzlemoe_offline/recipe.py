"""What a user chooses about a compression run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from puzzlemoe_vllm.format.codes import get_code

Method = Literal["puzzlemoe", "mergemoe"]
Code = Literal["mask16", "angle16", "angle8", "angle6", "mask6"]
Rule = Literal["paper", "least-squares"]
Pairing = Literal["random", "search", "coactivation"]
Saliency = Literal["wanda", "magnitude"]


class RecipeError(ValueError):
    """Choices that contradict each other; the text says which, and what to choose instead."""


class Recipe(BaseModel):
    """Recorded in the packed model's provenance.  The defaults are the paper's.

    method: `puzzlemoe` merges experts in pairs, entry by entry; `mergemoe` merges them in clusters, and only `experts`
    below concerns it.
    experts: mergemoe's clusters per layer; None for puzzlemoe.
    code: what a pair's word holds (`puzzlemoe_vllm.format.codes`).
    rule: how a mask16 word is chosen: the `paper`'s threshold and saliency, or `least-squares`, weighted with each
    expert's squared input norms, which the other codes always use.
    compensate: push each expert's error in a column into its later columns; needs calibration and a least-squares fit.
    group_size: input columns that share a step, in codes with steps; None for the largest that fits the model.
    sparsity: share of the routed experts' memory that goes away, 0.5 (every expert merged) or 0.25 (half of them).
    tau: similarity threshold of Eq. 1, in [0, 1].
    pairing: partners at `random`, as in the paper; by `search`, the matching with the least weighted squared error of
    the merged weights; or by `coactivation`, the matching whose partners are chosen by the same token most often.
    saliency: `wanda` is |W| * ||X||_2 per input column, from calibration; `magnitude` is |W| and needs none.
    seed: of the random pairing, and of the choice of calibration windows.
    """

    model_config = ConfigDict(frozen=True)

    method: Method = "puzzlemoe"
    experts: int | None = None
    code: Code = "mask16"
    rule: Rule = "paper"
    compensate: bool = False
    group_size: int | None = None
    sparsity: float = 0.5
    tau: float = Field(default=0.4, ge=0, le=1)
    pairing: Pairing = "random"
    saliency: Saliency = "wanda"
    seed: int = 0

    @property
    def is_paper(self) -> bool:
        """Whether words are chosen by the paper's rule."""
        return self.code == "mask16" and self.rule == "paper"

    def heeded(self) -> dict[str, Any]:
        """The choices that the method, the code and the rule heed, as JSON data."""
        if self.method == "mergemoe":
            return self.model_dump(include={"method", "experts"})
        return self.model_dump(exclude=None if self.is_paper else {"tau"}, exclude_none=True)

    @model_validator(mode="after")
    def _choices_fit_together(self) -> Recipe:
        if (self.experts is None) == (self.method == "mergemoe"):
            raise ValueError("experts is the number of mergemoe's clusters: both or neither")
        if self.group_size is not None:
            get_code(self.code).check_group_size(self.group_size)
        if "rule" in self.model_fields_set and self.rule == "paper" and self.code != "mask16":
            raise ValueError(
                f"the paper's rule chooses mask16 words, {self.code} ones are chosen by least squares: "
                "use --recipe paper, or drop --rule"
            )
        if "tau" in self.model_fields_set and not self.is_paper:
            raise ValueError(
                "tau is the threshold of the paper's rule, least squares has none: use --recipe paper, or drop --tau"
            )
        if self.compensate and self.is_paper:
            raise ValueError(
                "compensation needs --rule least-squares: use that, or --no-compensate (--recipe paper has neither)"
            )
        if self.compensate and self.saliency == "magnitude":
            raise ValueError("compensation needs calibration: use --saliency wanda, or --no-compensate")
        if self.pairing == "coactivation" and self.saliency == "magnitude":
            raise ValueError("pairing by coactivation needs calibration: use --saliency wanda, or --pairing search")
        return self

    @field_validator("sparsity")
    @classmethod
    def _known_sparsity(cls, sparsity: float) -> float:
        if sparsity not in (0.5, 0.25):
            raise ValueError(f"sparsity {sparsity} is neither 0.5 nor 0.25: use one of them")
        return sparsity


RecipeName = Literal["default", "paper"]

NAMED: dict[RecipeName, dict[str, Any]] = {
    "default": {"code": "angle8", "rule": "least-squares", "compensate": True, "pairing": "search"},
    "paper": {},
}
"""Fields in which a recipe differs from the paper's."""


def named_recipe(name: RecipeName, **changes: Any) -> Recipe:
    """A named recipe with some fields changed; None leaves a field as it is.

    Raises RecipeError for fields that contradict each other, be they the recipe's or changed.
    """
    given = {field: value for field, value in changes.items() if value is not None}
    try:
        return Recipe(**NAMED[name] | given)
    except ValidationError as error:
        raise RecipeError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
