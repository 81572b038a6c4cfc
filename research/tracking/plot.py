"""The loss curve as a picture: training loss, raw and smoothed, validation loss, bits per byte."""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from research.tracking.format import count
from research.tracking.metrics import read

Points = tuple[list[float], list[float]]
"""x and y of a curve."""

TRAIN, VALIDATION, FAINT = "#3b6fb6", "#d1495b", "#8a8f98"


def loss_curve(metrics: Path, picture: Path, title: str, subtitle: str = "") -> None:
    """Draw metrics.jsonl into a PNG, replaced whole. With no rows it is a picture that says so.

    x: tokens seen; y: nats a token. Rows whose value is not finite leave a gap in the curve. Never raises: a run that has
    trained is not to fail for its picture, so what goes wrong (a full disk) goes to the log.
    """
    try:
        _draw(metrics, picture, title, subtitle)
    except Exception:
        logging.getLogger(__name__).exception("%s could not be drawn", picture)


def _draw(metrics: Path, picture: Path, title: str, subtitle: str) -> None:
    figure, axes = _canvas(title, subtitle)
    rows = list(read(metrics))
    train, validation = _points(rows, "train/loss"), _points(rows, "val/loss")
    _draw_train(axes, train)
    _draw_validation(axes, validation, _points(rows, "val/bits_per_byte"))
    if train[0] or validation[0]:
        _frame(axes, train, validation)
    else:
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", color=FAINT)
    _save(figure, picture)


def _canvas(title: str, subtitle: str) -> tuple[Any, Any]:
    """A figure of its own (no pyplot, so no global state and no window), with the axes labelled."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns at length where HOME cannot be written
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


def _points(rows: Sequence[dict[str, Any]], key: str) -> Points:
    """The rows' values over tokens; a row without the axis or with another thing than a number is passed over."""
    kept = [row for row in rows if _number(row.get(key)) and _number(row.get("progress/tokens"))]
    return [row["progress/tokens"] for row in kept], [y if math.isfinite(y := row[key]) else math.nan for row in kept]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def smooth(values: Sequence[float], radius: int) -> list[float]:
    """Each value's mean with `radius` neighbours on either side, fewer near an end so that the mean stays centred (no lag).

    A straight line stays itself; values that are not finite are left out of the mean.
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


def _draw_train(axes: Any, train: Points) -> None:
    """The rows as they are, faint, and smoothed over about a tenth of the run."""
    x, y = train
    alone = len(x) == 1
    axes.plot(x, y, color=TRAIN, alpha=0.35, linewidth=1, marker="o" if alone else None, label="train" if alone else None)
    if len(x) > 1:
        axes.plot(x, smooth(y, max(1, len(x) // 20)), color=TRAIN, linewidth=1.8, label="train (smoothed)")


def _draw_validation(axes: Any, validation: Points, bits: Points) -> None:
    """A point a validation; the lowest one says its bits per byte."""
    if not validation[0]:
        return
    axes.plot(*validation, color=VALIDATION, linewidth=1.2, marker="o", markersize=4, label="validation")
    finite = [(y, x) for x, y in zip(*bits, strict=True) if math.isfinite(y)]
    if not finite:
        return
    best, at = min(finite)
    height = dict(zip(*validation, strict=True)).get(at)
    if height is not None and math.isfinite(height):
        axes.annotate(f"{best:.3f} bits/byte", (at, height), (0, 12), textcoords="offset points", ha="right", color=VALIDATION, fontsize=9)


def _frame(axes: Any, train: Points, validation: Points) -> None:
    """From 0 to the last token, and a legend."""
    axes.set_xlim(0, max([*train[0], *validation[0]]) * 1.02 or 1)
    axes.legend(frameon=False, loc="upper right")


def _save(figure: Any, picture: Path) -> None:
    """Write beside, then rename: whoever looks sees a whole picture."""
    temporary = picture.with_name(f".{picture.name}.{os.getpid()}")
    figure.savefig(temporary, format="png")
    temporary.replace(picture)
