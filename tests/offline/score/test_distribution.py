"""What inspect --plots draws: the counts, and the theoretical curve against sampling."""

import pytest
import torch
from support.models import build
from support.runs import compress_pairs
from typer.testing import CliRunner

from puzzlemoe_offline.cli.main import app
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.weight_files import CheckpointError
from puzzlemoe_offline.score.distribution import (
    RATIO_BINS,
    Distribution,
    expert_distribution,
    exponent_counts,
    ratio_counts,
    similar_share,
)
from puzzlemoe_offline.words.paper_rule import similar


@pytest.mark.parametrize("tau", [0.05, 0.2, 0.4, 0.7, 1.0])
def test_the_share_of_similar_entries_of_normal_weights(tau):
    weights = torch.randn(2, 1_000_000, generator=torch.Generator().manual_seed(0)).abs()
    # Five standard deviations of a share over a million draws.
    assert float(similar(*weights, tau).float().mean()) == pytest.approx(similar_share(tau), abs=0.0025)


def test_exponents_are_counted_by_field():
    counts = exponent_counts(torch.tensor([[1.0, -1.5, 2.0], [0.0, 0.25, -0.3]]).bfloat16())
    assert {field: int(count) for field, count in enumerate(counts) if count} == {0: 1, 125: 2, 127: 2, 128: 1}


def test_ratios_are_counted_as_the_rule_compares_them():
    torch.manual_seed(0)
    weights = torch.randn(2, 64, 96).bfloat16()
    weights[:, 0] = 0
    found = Distribution(torch.ones(256, dtype=torch.int64), ratio_counts(*weights))
    taus, shares = found.shares()
    for tau in (0.1, 0.4, 0.9):
        expected = float(similar(*weights.float().abs(), tau).float().mean())
        assert shares[taus.index(tau)] == pytest.approx(expected, abs=0.002)
    assert shares[-1] == 1 and shares[0] > 1 / 64


def test_a_model_of_normal_weights_follows_the_curve(tmp_path):
    source = build("qwen3_moe", tmp_path / "source")
    found = expert_distribution(Checkpoint(source))
    assert int(found.ratios.sum()) == 2 * 4 * 3 * 64 * 128
    taus, shares = found.shares()
    # The first rows of the down projections are zeros, which are similar.
    zeros = 8 * 64 / (3 * 64 * 128)
    expected = zeros + (1 - zeros) * similar_share(0.4)
    assert shares[taus.index(0.4)] == pytest.approx(expected, abs=0.005)
    assert 0.9 < found.in_word() < 1
    assert len(found.ratios) == RATIO_BINS


def test_both_figures_are_drawn(tmp_path):
    source = build("mixtral", tmp_path / "source")
    done = CliRunner().invoke(app, ["inspect", str(source), "--plots", str(tmp_path / "plots")])
    assert done.exit_code == 0, done.output
    for name in ("exponents.png", "similarity.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_a_packed_model_has_no_such_figures(tmp_path):
    compress_pairs(build("mixtral", tmp_path / "source"), tmp_path / "packed")
    with pytest.raises(CheckpointError, match="draws the weights of its dense source"):
        expert_distribution(Checkpoint(tmp_path / "packed"))
