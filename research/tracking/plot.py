"""Draws loss.png, the loss curve of a run: training loss, raw and smoothed, validation loss, bits per byte."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallel.files import published
from research.tracking.format import count
from research.tracking.metrics import read

Points = tuple[list[float], list[float]]
"""x and y of a curve."""

TRAIN, VALIDATION, FAINT = "#3b6fb6", "#d1495b", "#8a8f98"


def loss_curve(metrics: Path, picture: Path, title: str, subtitle: str = "") -> None:
    """Draws metrics.jsonl into a PNG file, which is replaced atomically. If there are no rows, the picture says so.

    x: tokens seen; y: nats per token. Rows whose value is not finite leave a gap in the curve. Never raises: a run that has
    trained must not fail because of its picture, so an error (a full disk, for example) is logged.
    """
    try:
        figure, axes = _canvas(title, subtitle)
        _draw(axes, list(read(metrics)))
        with published(picture) as temporary:
            figure.savefig(temporary, format="png")
    except Exception:
        logging.getLogger(__name__).exception("%s could not be drawn", picture)


def _canvas(title: str, subtitle: str) -> tuple[Any, Any]:
    """A figure of its own (no pyplot, so no global state and no window), with the axes labelled."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns at length if HOME cannot be written
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=22 if subtitle else 8, parse_math=False)
    axes.text(0, 1.025, subtitle, transform=axes.transAxes, fontsize=8.5, color=FAINT, parse_math=False)
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("loss (nats a token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(lambda x, _: count(x) if x >= 0 else "")
    return figure, axes


def _draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    train, validation = _points(rows, "train/loss"), _points(rows, "val/loss")

    # training loss: the rows as they are, faint, and smoothed over about a tenth of the run
    x, y = train
    alone = len(x) == 1
    axes.plot(x, y, color=TRAIN, alpha=0.35, linewidth=1, marker="o" if alone else None, label="train" if alone else None)
    if len(x) > 1:
        axes.plot(x, smooth(y, max(1, len(x) // 20)), color=TRAIN, linewidth=1.8, label="train (smoothed)")
    if not train[0] and not validation[0]:
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", color=FAINT)
        return

    # one point per validation; the lowest one is marked with its bits per byte
    if validation[0]:
        axes.plot(*validation, color=VALIDATION, linewidth=1.2, marker="o", markersize=4, label="validation")
        finite = [(bits, x) for x, bits in zip(*_points(rows, "val/bits_per_byte"), strict=True) if math.isfinite(bits)]
        best, at = min(finite, default=(math.nan, math.nan))
        height = dict(zip(*validation, strict=True)).get(at, math.nan)
        if math.isfinite(height):
            style: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "color": VALIDATION, "fontsize": 9}
            axes.annotate(f"{best:.3f} bits/byte", (at, height), (0, 12), **style)

    axes.set_xlim(0, max([*train[0], *validation[0]]) * 1.02 or 1)
    axes.legend(frameon=False, loc="upper right")


def _points(rows: Sequence[dict[str, Any]], key: str) -> Points:
    """The rows' values over tokens; a row without the axis, or whose value is not a number, is left out."""

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    kept = [row for row in rows if is_number(row.get(key)) and is_number(row.get("progress/tokens"))]
    return [row["progress/tokens"] for row in kept], [y if math.isfinite(y := row[key]) else math.nan for row in kept]


def smooth(values: Sequence[float], radius: int) -> list[float]:
    """The mean of each value and `radius` neighbours on either side; fewer near an end, so that the mean stays centred (no lag).

    A straight line stays unchanged; values that are not finite are left out of the mean.
    """
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value if math.isfinite(value) else 0.0))
        counts.append(counts[-1] + math.isfinite(value))
    means = []
    for i in range(len(values)):
        reach = min(radius, i, len(values) - 1 - i)
        low, high = i - reach, i + reach + 1
        number = counts[high] - counts[low]
        means.append((sums[high] - sums[low]) / number if number else math.nan)
    return means
