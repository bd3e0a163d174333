"""Named recipes, what may be changed about them, and what contradicts itself."""

from typing import get_args

import pytest

from puzzlemoe_offline.recipe import CODE_OF_BITS, Bits, PairRecipe, RecipeError, code_of_bits, named_recipe
from puzzlemoe_vllm.format.codes import get_code


def test_the_paper_is_one_name_away():
    paper = named_recipe("paper", seed=0)
    assert paper == PairRecipe()
    assert (paper.code, paper.rule, paper.tau, paper.pairing) == ("mask16", "paper", 0.4, "random")
    assert (paper.saliency, paper.compensate, paper.sparsity) == ("wanda", False, 0.5)


def test_the_default_and_changes_to_it():
    default = named_recipe("default")
    assert (default.code, default.compensate, default.pairing) == ("angle8", True, "search")
    changed = named_recipe("default", code="angle16", compensate=False, tau=None, sparsity=0.25)
    assert changed == PairRecipe(code="angle16", compensate=False, pairing="search", sparsity=0.25)
    assert changed.rule is None and changed.tau is None
    assert named_recipe("default", code="mask16").rule == "least-squares"
    assert named_recipe("paper", tau=0.2).tau == 0.2


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("default", {"tau": 0.3}, r"tau is the threshold .* --recipe paper"),
        ("default", {"rule": "paper"}, r"rule paper: angle8 words are always chosen by least squares: drop --rule"),
        ("default", {"rule": "least-squares"}, r"rule least-squares: angle8 words .* drop --rule"),
        ("paper", {"code": "angle8", "rule": "paper"}, r"rule paper: angle8 words .* drop --rule"),
        ("paper", {"code": "angle9"}, r"unknown pair-word code 'angle9'; this version knows angle16"),
        ("default", {"rule": "paper", "code": "mask16"}, r"--rule least-squares: use that, or --no-compensate"),
        ("default", {"saliency": "magnitude"}, r"--saliency wanda, or --no-compensate"),
        ("paper", {"compensate": True}, r"--rule least-squares: use that, or --no-compensate"),
        (
            "paper",
            {"pairing": "coactivation", "saliency": "magnitude"},
            r"coactivation needs .* --pairing search",
        ),
        ("paper", {"group_size": 64}, r"mask16 has no group steps"),
        ("default", {"group_size": 48}, r"angle8 has one step per group of 32, 64, 128 columns"),
        ("paper", {"sparsity": 0.3}, r"sparsity 0.3 is neither 0.5 nor 0.25"),
        ("paper", {"tau": 1.5}, r"less than or equal to 1"),
    ],
)
def test_contradictions(name, changes, message):
    with pytest.raises(RecipeError, match=message) as caught:
        named_recipe(name, **changes)
    assert "\n" not in str(caught.value)


def test_what_is_recorded_is_what_was_done():
    """A rule and a threshold are there where they chose the words, and only there."""
    assert named_recipe("paper").model_dump(exclude_none=True).items() >= {"rule": "paper", "tau": 0.4}.items()
    for other in (named_recipe("paper", code="angle8"), named_recipe("default", code="mask16")):
        assert "tau" not in other.model_dump(exclude_none=True)
    assert "rule" not in named_recipe("paper", code="angle8").model_dump(exclude_none=True)


@pytest.mark.parametrize("bits", get_args(Bits))
def test_bits_name_a_code_of_that_size(bits):
    code = code_of_bits(bits, None)
    assert code == CODE_OF_BITS[bits] and get_code(code).bits == 2 * float(bits)
    assert named_recipe("default", code=code).compensate


def test_down_projections_are_corrected_with_compensation_if_nothing_else_is_said():
    assert named_recipe("default").correct_down and PairRecipe(code="angle8", compensate=True).correct_down
    assert not named_recipe("default", correct_down=False).correct_down
    assert not named_recipe("default", compensate=False).correct_down and not named_recipe("paper").correct_down
    with pytest.raises(RecipeError, match=r"correction of down projections needs compensation: use --compensate"):
        named_recipe("default", compensate=False, correct_down=True)


def test_a_code_of_other_bits_is_refused():
    assert code_of_bits("3", "angle6") == "angle6"
    with pytest.raises(RecipeError, match=r"--bits 3 and --code angle8, of 4 bits: drop one of them"):
        code_of_bits("3", "angle8")
