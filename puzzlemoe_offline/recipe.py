"""What a user chooses about a compression run.

A field's description is its help on the command line, and its row in docs/options.md.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from puzzlemoe_vllm.errors import UserError
from puzzlemoe_vllm.format.codes import get_code

Rule = Literal["paper", "least-squares"]
Pairing = Literal["random", "search", "coactivation", "balanced"]
Saliency = Literal["wanda", "magnitude"]

TAU = 0.4
"""The paper's threshold of similarity."""


class RecipeError(UserError):
    """Choices that contradict each other; the text says which, and what to choose instead."""


class PairRecipe(BaseModel):
    """Experts merged in pairs, entry by entry; the defaults are the paper's.  Recorded in a packed model's provenance.

    rule: None for codes whose words are always chosen by least squares.  tau: None but for the paper's rule.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["puzzlemoe"] = "puzzlemoe"
    code: str = Field(
        default="mask16",
        description="Bits of a pair's word, and how two weights share them: masks (the paper), directions, a trellis.",
    )
    rule: Rule | None = Field(
        default=None, description="mask16: the paper's threshold and saliency, or least squares as in the other codes."
    )
    compensate: bool = Field(
        default=False, description="Push each expert's error in a column into its later ones, as GPTQ does."
    )
    correct_down: bool = Field(
        default=False,
        description="Fit down projections to what packed gate and up projections put out, so that they make up for "
        "what those lost; on with compensation if not given.",
    )
    group_size: int | None = Field(
        default=None,
        description="Codes with steps: input columns per step, 128, 64 or 32; the largest that fits if not given.",
    )
    sparsity: float = Field(
        default=0.5, description="0.5 merges all experts of a layer, 0.25 the half that calibration uses less."
    )
    tau: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description=f"Paper's rule: similarity threshold below which a pair shares its mean; {TAU} if not given.",
    )
    pairing: Pairing = Field(
        default="random",
        description="Partners at random, those that lose least, those that share most tokens, or both weighed.",
    )
    saliency: Saliency = Field(
        default="wanda",
        description="wanda: |W| times the input column's norm; magnitude: |W| alone, which needs no calibration.",
    )
    seed: int = Field(default=0, description="Of random partners, and of the choice of calibration windows.")

    @property
    def is_paper(self) -> bool:
        """Whether words are chosen by the paper's rule."""
        return self.rule == "paper"

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is needed."""
        return self.saliency == "wanda"

    @model_validator(mode="before")
    @classmethod
    def _what_follows(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The rule of a code that has several, and the rule's threshold."""
        code = get_code(given.get("code", cls.model_fields["code"].default))
        rule = given.get("rule") or (code.rules[0] if code.rules else None)
        tau = given.get("tau")
        correct = given.get("correct_down")
        given = given | {"correct_down": bool(given.get("compensate")) if correct is None else correct}
        return given | {"rule": rule, "tau": TAU if rule == "paper" and tau is None else tau}

    @model_validator(mode="after")
    def _choices_fit_together(self) -> PairRecipe:
        code = get_code(self.code)
        if self.group_size is not None:
            code.check_group_size(self.group_size)
        if self.rule is not None and self.rule not in code.rules:
            raise ValueError(f"rule {self.rule}: {self.code} words are always chosen by least squares: drop --rule")
        if self.tau is not None and not self.is_paper:
            raise ValueError(
                "tau is the threshold of the paper's rule, least squares has none: use --recipe paper, or drop --tau"
            )
        if self.compensate and self.is_paper:
            raise ValueError(
                "compensation needs --rule least-squares: use that, or --no-compensate (--recipe paper has neither)"
            )
        if self.correct_down and not self.compensate:
            raise ValueError(
                "correction of down projections needs compensation: use --compensate, or drop --correct-down"
            )
        if self.compensate and not self.calibrated:
            raise ValueError("compensation needs calibration: use --saliency wanda, or --no-compensate")
        if self.pairing in ("coactivation", "balanced") and not self.calibrated:
            raise ValueError(f"--pairing {self.pairing} needs calibration: use --saliency wanda, or --pairing search")
        return self

    @field_validator("sparsity")
    @classmethod
    def _known_sparsity(cls, sparsity: float) -> float:
        if sparsity not in (0.5, 0.25):
            raise ValueError(f"sparsity {sparsity} is neither 0.5 nor 0.25: use one of them")
        return sparsity


class ClusterRecipe(BaseModel):
    """MergeMoE: whole experts merged in clusters, each into one dense expert."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["mergemoe"] = "mergemoe"
    clusters: int = Field(description="mergemoe: experts that are left in every layer.")

    @property
    def calibrated(self) -> bool:
        """Always: the merged experts are fitted to what the members put out."""
        return True


Recipe = Annotated[PairRecipe | ClusterRecipe, Field(discriminator="method")]
MethodName = Literal["puzzlemoe", "mergemoe"]
RecipeName = Literal["default", "paper"]
Bits = Literal["1.5", "2", "2.5", "3", "4", "8"]

CODE_OF_BITS: dict[Bits, str] = {
    "1.5": "trellis3",
    "2": "trellis4",
    "2.5": "trellis5",
    "3": "trellis6",
    "4": "trellis8",
    "8": "angle16",
}
"""The code that loses least at so many bits per weight, steps aside."""

NAMED: dict[RecipeName, dict[str, Any]] = {
    "default": {"code": "angle8", "rule": "least-squares", "compensate": True, "pairing": "search"},
    "paper": {},
}
"""Fields in which a recipe for pairs differs from the paper's."""


def code_of_bits(bits: Bits, code: str | None) -> str:
    """The code of so many bits per weight: `code` if one was named, or else the best.

    Raises RecipeError for a code of other bits.
    """
    if code is not None and get_code(code).bits != 2 * float(bits):
        raise RecipeError(f"--bits {bits} and --code {code}, of {get_code(code).bits / 2:g} bits: drop one of them")
    return code or CODE_OF_BITS[bits]


def named_recipe(name: RecipeName, **changes: Any) -> PairRecipe:
    """A named recipe with some fields changed; None leaves a field as it is.

    Raises RecipeError for fields that contradict each other, be they the recipe's or changed, and for a rule where the
    code leaves no choice.
    """
    given = {field: value for field, value in changes.items() if value is not None}
    fields = NAMED[name] | given
    try:
        if "rule" not in given and not get_code(fields.get("code", "mask16")).rules:
            fields.pop("rule", None)
        return PairRecipe(**fields)
    except (ValidationError, ValueError) as error:
        raise RecipeError(reason(error)) from None


def reason(error: ValueError) -> str:
    """The first thing that pydantic found wrong, or what another check says."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        field = f"{first['loc'][0]}: " if first["loc"] and first["type"] != "value_error" else ""
        return field + first["msg"].removeprefix("Value error, ")
    return str(error)
