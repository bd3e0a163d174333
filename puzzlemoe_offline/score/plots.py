"""Every figure that the tool draws, as PNG."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from puzzlemoe_offline.methods import BASELINES
from puzzlemoe_offline.score.compare import Row
from puzzlemoe_offline.score.distribution import Distribution, similar_share
from puzzlemoe_vllm.format.codes.mask16 import EXPONENT_OFFSET, Mask16


def draw_comparison(rows: list[Row], title: str, target: Path) -> None:
    """Rise of the perplexity over dense against bits per expert weight, a panel for each text.

    rows: the dense model first, then recipes and baselines, which are drawn apart.
    """
    texts = list(rows[0].perplexity)
    figure, panels = plt.subplots(1, len(texts), figsize=(8 * len(texts), 6), squeeze=False)
    for axes, text in zip(panels[0], texts, strict=True):
        _comparison_panel(axes, rows, text)
    _save(figure, title, target)


def _comparison_panel(axes: Axes, rows: list[Row], text: str) -> None:
    base = rows[0].mean(text)
    for label, marker, ours in (("recipes", "o", True), ("baselines", "s", False)):
        for row in rows[1:]:
            if (row.name not in BASELINES) != ours:
                continue
            rise, spread = 100 * (row.mean(text) / base - 1), 100 * row.spread(text) / base
            colour = "tab:blue" if ours else "tab:orange"
            axes.errorbar(row.bits_per_weight, rise, yerr=spread, fmt=marker, color=colour, label=label)
            label = "_nolegend_"
            # On two sides, so that names of equal size do not cover each other.
            side, offset = ("left", 6) if ours else ("right", -6)
            point = row.bits_per_weight, rise
            axes.annotate(row.name, point, (offset, -3), textcoords="offset points", ha=side, size=8)
    # Rises span orders of magnitude, and the smallest may be below zero.
    axes.set_yscale("symlog", linthresh=0.1)
    axes.margins(x=0.2)
    axes.axhline(0, color="grey", linewidth=1, linestyle="--")
    axes.set(xlabel="bits per expert weight", ylabel="perplexity over dense, %", title=f"{text}, dense {base:.2f}")
    axes.grid(alpha=0.3, which="both")
    if len(rows) > 1:
        axes.legend()


def draw_tau_sweep(rows: list[Row], taus: list[float], title: str, target: Path) -> None:
    """Perplexity against the similarity threshold (Fig. 5); rows: the dense model, then one for each of `taus`."""
    figure, axes = plt.subplots(figsize=(7, 5))
    for text in rows[0].perplexity:
        means, spreads = [row.mean(text) for row in rows[1:]], [row.spread(text) for row in rows[1:]]
        line = axes.errorbar(taus, means, yerr=spreads, marker="o", label=text)
        axes.axhline(rows[0].mean(text), color=line[0].get_color(), linewidth=1, linestyle="--", label=f"{text}, dense")
    axes.set(xlabel="similarity threshold tau", ylabel="perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, title, target)


def draw_exponents(found: Distribution, title: str, target: Path) -> None:
    """Share of the experts' weights by bf16 exponent (Fig. 3 and 6), and the range that a mask16 word can hold."""
    shares = (found.exponents / found.exponents.sum()).tolist()
    used = [exponent for exponent, share in enumerate(shares) if share]
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.bar(used, [shares[exponent] for exponent in used])
    last = EXPONENT_OFFSET + 31
    label = f"{Mask16.name}: {EXPONENT_OFFSET} to {last}, {found.in_word():.4%} of the weights"
    axes.axvspan(EXPONENT_OFFSET - 0.5, last + 0.5, alpha=0.15, color="tab:green", label=label)
    axes.set_yscale("log")
    axes.set(xlabel="bf16 exponent field", ylabel="share of the expert weights")
    axes.legend(loc="upper left")
    _save(figure, title, target)


def draw_similarity(found: Distribution, title: str, target: Path) -> None:
    """Share of similar entries of two experts against tau (Fig. 7), with the curve for normal weights."""
    taus, shares = found.shares()
    figure, axes = plt.subplots(figsize=(7, 5))
    axes.plot(taus, shares, label="experts 2p and 2p + 1 of this model")
    axes.plot(taus, [similar_share(tau) for tau in taus], "--", label="normal weights: (4 / pi) arctan(tau)")
    axes.set(xlabel="similarity threshold tau", ylabel="share of similar entries", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, title, target)


def _save(figure: Figure, title: str, target: Path) -> None:
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)
