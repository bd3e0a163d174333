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
    """Perplexity against bits per expert weight, a panel for each text; recipes and baselines apart.

    rows: the dense model first.
    """
    texts = list(rows[0].perplexity)
    figure, panels = plt.subplots(1, len(texts), figsize=(7 * len(texts), 5), squeeze=False)
    for axes, text in zip(panels[0], texts, strict=True):
        _comparison_panel(axes, [row for row in rows if not row.refused], text)
    _save(figure, title, target)


def _comparison_panel(axes: Axes, rows: list[Row], text: str) -> None:
    axes.axhline(rows[0].mean(text), color="grey", linewidth=1, linestyle="--", label="dense")
    for label, marker, ours in (("this tool", "o", True), ("baselines", "s", False)):
        chosen = [row for row in rows[1:] if (row.name in RECIPES) == ours]
        axes.errorbar(
            [row.bits_per_weight for row in chosen],
            [row.mean(text) for row in chosen],
            yerr=[row.spread(text) for row in chosen],
            fmt=marker,
            label=label,
        )
    for row in rows[1:]:
        point = row.bits_per_weight, row.mean(text)
        axes.annotate(row.name, point, xytext=(4, 4), textcoords="offset points", size=8)
    # Dropped experts cost so much that the others would lie on one line.
    axes.set_yscale("log")
    axes.set(xlabel="bits per expert weight", ylabel="perplexity", title=text)
    axes.grid(alpha=0.3, which="both")
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
