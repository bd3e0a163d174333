"""Every figure that the tool draws, as PNG."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from puzzlemoe_offline.compare import RECIPES, Row


def draw_comparison(rows: list[Row], title: str, target: Path) -> None:
    """Rise of the perplexity over dense against bits per expert weight, a panel for each text.

    rows: the dense model first, then recipes and baselines, which are drawn apart.
    """
    texts = list(rows[0].perplexity)
    figure, panels = plt.subplots(1, len(texts), figsize=(8 * len(texts), 6), squeeze=False)
    for axes, text in zip(panels[0], texts, strict=True):
        _comparison_panel(axes, [row for row in rows if not row.refused], text)
    _save(figure, title, target)


def _comparison_panel(axes: Axes, rows: list[Row], text: str) -> None:
    base = rows[0].mean(text)
    for label, marker, ours in (("recipes", "o", True), ("baselines", "s", False)):
        for row in rows[1:]:
            if (row.name in RECIPES) != ours:
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
    axes.margins(x=0.15)
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


def _save(figure: Figure, title: str, target: Path) -> None:
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)
