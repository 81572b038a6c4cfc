"""The pictures of a comparison: the metric of every side with a band over its seeds, and the differences with their intervals."""

import logging
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.ablation import report
from research.ablation.comparison import Comparison
from research.ablation.sides import FinishedRun
from research.ablation.statistics import Verdict
from research.tracking.plot import DASHES, Theme, add_legend, points, style_axes

GRID = 200
"""Points of a band whose runs have no rows at the same places."""
LONGEST_LABEL, LONGEST_TITLE = 28, 80
"""Letters."""


def curves(comparison: Comparison, theme: Theme) -> Any:
    """A matplotlib figure: the metric of each side, and its difference from the baseline. Lines are means over seeds, bands their range."""
    question = comparison.question
    figure = _figure(theme, (11, 4.6), comparison, "line: mean over seeds, band: from the lowest to the highest seed")
    whole, beside = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for axes, label in ((whole, question.metric), (beside, f"difference from {comparison.baseline.label}, seed by seed")):
        style_axes(axes, question.axis.label, label, theme)
        axes.xaxis.set_major_formatter(lambda value, _: question.axis.tick(value) if value >= 0 else "")
        if comparison.cut:
            axes.axvline(comparison.place, color=theme.faint, linewidth=0.9, linestyle=":")
    beside.axhline(0, color=theme.runs[0], linewidth=1.4)
    for i, side in enumerate(comparison.sides):
        style = {"color": theme.runs[i % len(theme.runs)], "linestyle": DASHES[i // len(theme.runs) % len(DASHES)]}
        _draw_band(whole, *band(comparison, [*side.runs.values()]), style)
        if i:
            seeds = comparison.variants[i - 1].seeds
            xs, both = band(comparison, [one.runs[seed] for one in (comparison.baseline, side) for seed in seeds])
            _draw_band(beside, xs, both[len(seeds) :] - both[: len(seeds)], style)
    add_legend(figure, [f"{side.label} ({report.plural(len(side.runs), 'seed')})" for side in comparison.sides], theme, 11)
    return figure


def _draw_band(axes: Any, xs: np.ndarray, ys: np.ndarray, style: dict[str, Any]) -> None:
    axes.fill_between(xs, ys.min(0), ys.max(0), color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(xs, ys.mean(0), **style, linewidth=1.7, marker="o" if len(xs) <= 20 else None, markersize=4)


def band(comparison: Comparison, runs: Sequence[FinishedRun]) -> tuple[np.ndarray, np.ndarray]:
    """(x, 'run x'): the finite values of the runs at places that all of them have, or interpolated where they do not."""
    found = []
    for run in runs:
        xs, ys = map(np.asarray, points(run.rows, comparison.question.metric, comparison.question.axis.key))
        found.append((xs[np.isfinite(ys)], ys[np.isfinite(ys)]))
    places = found[0][0]
    if not all(np.array_equal(xs, places) for xs, _ in found):
        first, last = max(xs[0] for xs, _ in found), min(xs[-1] for xs, _ in found)
        places = np.linspace(first, max(first, last), GRID)
    return places, np.stack([np.interp(places, xs, ys) for xs, ys in found])


def differences(comparison: Comparison, theme: Theme) -> Any:
    """A forest plot: for each variant the mean difference with its 95 % interval, and the difference of every seed as a ring."""
    question, variants = comparison.question, comparison.variants
    what = f"difference from {comparison.baseline.label}: mean and 95 % interval, rings: single seeds"
    figure = _figure(theme, (8, 1.9 + 0.62 * len(variants)), comparison, what)
    axes = figure.add_subplot()
    style_axes(axes, f"{question.metric}, {'higher' if question.higher_is_better else 'lower'} is better", "", theme)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=theme.grid, linewidth=0.8)
    axes.axvline(0, color=theme.faint, linewidth=1)
    colors = {Verdict.BETTER: theme.runs[2], Verdict.WORSE: theme.runs[1], Verdict.NOT_DISTINGUISHABLE: theme.faint}
    for i, variant in enumerate(variants):
        effect, color = variant.effect, colors[variant.verdict]
        if effect.n > 1:
            bounds = [[effect.mean - effect.low], [effect.high - effect.mean]]
            axes.errorbar([effect.mean], [i], xerr=bounds, fmt="none", ecolor=color, elinewidth=2, capsize=4)
        axes.plot([*variant.differences], [i] * effect.n, "o", markersize=6, markerfacecolor="none", markeredgecolor=color, alpha=0.7)
        axes.plot([effect.mean], [i], "s", color=color, markersize=7, markeredgecolor=theme.background)
        axes.annotate(
            variant.verdict.value, (1, i), (-2, 9), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", color=color,
            fontsize=8.5,
        )  # fmt: skip
    labels = [textwrap.fill(variant.side.label, LONGEST_LABEL) for variant in variants]
    axes.set_yticks(range(len(variants)), labels, color=theme.text, parse_math=False)
    axes.set_ylim(len(variants) - 0.4, -0.6)
    axes.margins(x=0.12)
    return figure


def _figure(theme: Theme, size: tuple[float, float], comparison: Comparison, what: str) -> Any:
    """An empty figure that does not belong to pyplot, with the sides' names and `what` is drawn on the left above it."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns at length if HOME cannot be written
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=size, dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08), facecolor=theme.background)
    FigureCanvasAgg(figure)
    names = f"{', '.join(variant.side.label for variant in comparison.variants)} beside {comparison.baseline.label}"
    heading = f"{textwrap.shorten(names, LONGEST_TITLE, placeholder=' …')}\n"
    figure.suptitle(heading, x=0.012, ha="left", fontsize=12, fontweight="bold", color=theme.text, parse_math=False)
    figure.text(0.012, 1 - 0.43 / size[1], what, fontsize=8.5, color=theme.faint, va="center", parse_math=False)
    return figure
