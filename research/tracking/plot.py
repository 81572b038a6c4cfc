"""Draws metrics.jsonl: loss.png at the end of a run, and the metrics of one run or of several over each other for `plot`.

A curve of few rows is drawn as it is. One of many is drawn twice: every row, faint, and the mean of neighbouring rows; the picture says
of how many.
"""

import logging
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.files import published
from research.tracking import format as fmt
from research.tracking.metrics import read

Points = tuple[list[float], list[float]]
"""x and y of a curve."""
Row = dict[str, Any]

SMOOTHED_FROM = 40
"""A curve of fewer rows is drawn raw."""
TASKS, STDERR = "eval/", "_stderr"


@dataclass(frozen=True)
class Theme:
    """The colours of a picture: one for each run, then the same ones dashed, and so on."""

    background: str
    text: str
    faint: str
    grid: str
    runs: tuple[str, ...]


LIGHT = Theme(
    "white", "#1f2328", "#6a7079", "#e6e8eb", ("#3b6fb6", "#d1495b", "#2a8f62", "#d9822b", "#7b5ea7", "#17879c", "#9c5a2d", "#5f6b7a")
)
DARK = Theme(
    "#14171c", "#e6e9ee", "#9aa2ad", "#2b3038", ("#6ea8fe", "#ff7b8a", "#5fd3a0", "#ffb454", "#b79cf2", "#4fc9dd", "#d79a6b", "#aab4c2")
)
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class XAxis:
    """What the curves are drawn over: a key of the rows, what it is called, and how its ticks are written."""

    key: str
    label: str
    tick: Callable[[float], str]
    intervals: tuple[int, ...] = ()
    """Distances of the ticks to choose from; empty: matplotlib's own, which are round in tens."""


X_AXES = {
    "tokens": XAxis("progress/tokens", "tokens seen", fmt.count),
    "steps": XAxis("progress/step", "optimizer steps", lambda x: f"{x:,.0f}"),
    "seconds": XAxis(
        "progress/seconds",
        "time since the start (minutes:seconds)",
        fmt.duration,
        (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400),
    ),
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a key of the rows, with a second key as dots in the same colour, and error bars if the rows have them."""

    label: str
    key: str
    dots: str | None = None
    smooths: bool = False
    """Whether many rows are also drawn as a mean."""
    is_log: bool = False


NAMED = {
    "loss": Panel("loss (nats per token)", "train/loss", "val/loss", smooths=True),
    "bits_per_byte": Panel("held-out text (bits per byte)", "val/bits_per_byte"),
    "lr": Panel("learning rate", "train/lr"),
    "grad_norm": Panel("gradient norm", "train/grad_norm", smooths=True, is_log=True),
    "tokens_per_second": Panel("tokens per second", "perf/tokens_per_second", smooths=True),
}
"""Metrics that have a short name."""


@dataclass(frozen=True)
class Curves:
    """One run: its name in the legend, and its rows."""

    label: str
    rows: Sequence[Row]


def panel_of(key: str) -> Panel:
    """The panel of any key of metrics.jsonl."""
    known = next((panel for panel in NAMED.values() if panel.key == key), None)
    if known is None and key.startswith(TASKS):
        return Panel(key.removeprefix(TASKS).replace("/", " · "), key)
    return known or Panel(key, key, smooths=key.startswith(("train/", "perf/")))


def keys_of(rows: Sequence[Row]) -> list[str]:
    """The keys whose values are numbers and can be drawn, in the order in which they first occur; no axes and no standard errors."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if _is_number(value))
    return [key for key in keys if not key.startswith("progress/") and not key.endswith(STDERR)]


def loss_curve(metrics: Path, picture: Path, title: str, subtitle: str = "") -> None:
    """Draws the loss curve of metrics.jsonl into a PNG file, which is replaced atomically. If there are no rows, the picture says so.

    x: tokens seen; y: nats per token; the lowest validation is marked with its bits per byte. Rows whose value is not finite leave a gap.
    Never raises: a run that has trained must not fail because of its picture, so an error (a full disk, for example) is logged.
    """
    try:
        rows = list(read(metrics))
        figure = draw([Curves("", rows)], [NAMED["loss"]], X_AXES["tokens"], LIGHT, title, subtitle)
        _mark_lowest(figure.axes[0], rows)
        save(figure, picture)
    except Exception:
        logging.getLogger(__name__).exception("%s could not be drawn", picture)


def save(figure: Any, picture: Path) -> None:
    """Writes the figure in the format that the name ends in; the file appears completely or not at all."""
    from matplotlib import rc_context

    same_ids = rc_context({"svg.hashsalt": "tessera"})  # of shapes in an SVG file, which are random otherwise
    with published(picture) as temporary, warnings.catch_warnings(), same_ids:
        warnings.simplefilter("ignore")  # a letter that the font lacks is drawn as a box
        kind = picture.suffix.removeprefix(".").lower()
        figure.savefig(temporary, format=kind, metadata={"Date": None} if kind == "svg" else None)  # the same file each time


def draw(runs: Sequence[Curves], panels: Sequence[Panel], x: XAxis, theme: Theme, title: str, subtitle: str = "") -> Any:
    """A matplotlib figure with one pair of axes per panel and one colour per run. Several runs get a legend below.

    The x axes are equal. Validations have the run's colour, or one of their own if there is only one run. The figure does not belong
    to pyplot, so there is no global state and no window.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns at length if HOME cannot be written
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MultipleLocator

    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = (8, 4.8) if len(panels) == 1 else (11, 3.4 * lines + 0.8)
    figure = Figure(figsize=size, dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08), facecolor=theme.background)
    FigureCanvasAgg(figure)
    heading = f"{title}\n" if subtitle else title
    figure.suptitle(heading, x=0.012, ha="left", fontsize=12, fontweight="bold", color=theme.text, parse_math=False)
    if subtitle:
        figure.text(0.012, 1 - 0.43 / size[1], subtitle, fontsize=8.5, color=theme.faint, va="center", parse_math=False)
    farthest = max(
        (at for run in runs for panel in panels for key in (panel.key, panel.dots or "") for at in points(run.rows, key, x.key)[0]),
        default=0,
    )
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(lines, columns, i + 1)
        style_axes(axes, x.label, panel.label, theme)
        axes.xaxis.set_major_formatter(lambda value, _: x.tick(value) if value >= 0 else "")
        _draw_panel(axes, runs, panel, x, theme)
        axes.set_xlim(0, farthest * 1.02 or 1)
        if interval := next((seconds for seconds in x.intervals if farthest <= 8 * seconds), None):
            axes.xaxis.set_major_locator(MultipleLocator(interval))
    if len(runs) > 1:
        add_legend(figure, [run.label for run in runs], theme, size[0])
    return figure


def style_axes(axes: Any, x_label: str, y_label: str, theme: Theme) -> None:
    """Labels, grid and colours of a pair of axes."""
    axes.set_facecolor(theme.background)
    axes.set_xlabel(x_label, color=theme.text, fontsize=9)
    axes.set_ylabel(y_label, color=theme.text, fontsize=9, parse_math=False)
    axes.tick_params(which="both", colors=theme.faint, labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.faint)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_panel(axes: Any, runs: Sequence[Curves], panel: Panel, x: XAxis, theme: Theme) -> None:
    """Every run's curve of one metric, and in a corner what lines and dots mean."""
    means: list[int] = []
    raw = drawn = dotted = False
    for i, run in enumerate(runs):
        style = {"color": theme.runs[i % len(theme.runs)], "linestyle": DASHES[i // len(theme.runs) % len(DASHES)]}
        xs, ys = points(run.rows, panel.key, x.key)
        radius = len(xs) // 20 if panel.smooths and len(xs) >= SMOOTHED_FROM else 0
        if radius:
            axes.plot(xs, ys, color=style["color"], alpha=0.28, linewidth=0.8)
            means.append(2 * radius + 1)
        raw |= bool(xs) and not radius
        marker = "o" if len(xs) == 1 or panel.key.startswith((TASKS, "val/")) else None
        axes.plot(xs, smooth(ys, radius), **style, linewidth=1.7, marker=marker, markersize=4)
        _error_bars(axes, run.rows, panel.key, x, style["color"])
        if panel.dots:
            dots, color = points(run.rows, panel.dots, x.key), style["color"] if len(runs) > 1 else theme.runs[1]
            axes.plot(*dots, color=color, linestyle=":", linewidth=1, marker="o", markersize=5, markeredgecolor=theme.background)
            dotted |= bool(dots[0])
        drawn |= bool(xs) or dotted
    corner: dict[str, Any] = {"transform": axes.transAxes, "color": theme.faint, "fontsize": 8}
    if not drawn:
        axes.text(0.5, 0.5, "nothing logged yet", **corner, ha="center")
        return
    if panel.is_log and _is_wide(axes):
        axes.set_yscale("log")
        for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            ticks(lambda value, _: f"{value:g}")
    axes.text(1, 1.01, meaning(means, raw, dotted), **corner, ha="right", va="bottom")


def meaning(means: Sequence[int], raw: bool, dotted: bool) -> str:
    """What a panel's lines and dots are: 'line: mean of 15 rows, faint: every row · dots: validation'; '' if that is plain.

    `means`: of how many rows each smoothed curve is the mean; `raw`: whether there is a curve that is not smoothed.
    """
    words = []
    if means:
        number = f"{min(means)}" if min(means) == max(means) else f"{min(means)} to {max(means)}"
        words = [f"line: mean of {number} rows, faint: every row", *["short runs: every row"] * raw]
    elif dotted and raw:
        words = ["line: training, every row"]
    return " · ".join(words + ["dots: validation"] * dotted)


def _is_wide(axes: Any) -> bool:
    """Whether the curves span more than a factor of ten, all above 0."""
    values = [y for line in axes.lines for y in line.get_ydata() if math.isfinite(y)]
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def _error_bars(axes: Any, rows: Sequence[Row], key: str, x: XAxis, color: str) -> None:
    """± one standard error, where the rows have it."""
    found = [row for row in rows if _is_number(row.get(key)) and _is_number(row.get(key + STDERR)) and _is_number(row.get(x.key))]
    if found:
        xs, ys, errors = ([row[name] for row in found] for name in (x.key, key, key + STDERR))
        axes.errorbar(xs, ys, yerr=errors, fmt="none", ecolor=color, elinewidth=1, capsize=2.5, alpha=0.7)


def add_legend(figure: Any, names: Sequence[str], theme: Theme, width: float) -> None:
    """The names of runs below the panels, in as many columns as there is room for in `width` inches."""
    from matplotlib.lines import Line2D

    letters = int(width * 13)  # of the legend's size, over the whole width
    labels = [textwrap.fill(name, letters - 8) for name in names]
    handles = [
        Line2D([], [], color=theme.runs[i % len(theme.runs)], linestyle=DASHES[i // len(theme.runs) % len(DASHES)], linewidth=2)
        for i in range(len(names))
    ]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    legend = figure.legend(
        handles, labels, loc="outside lower left", ncols=max(1, letters // (longest + 8)), frameon=False, fontsize=9, labelcolor=theme.text
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _mark_lowest(axes: Any, rows: Sequence[Row]) -> None:
    """The lowest validation's bits per byte, above its dot."""
    finite = [(bits, x) for x, bits in zip(*points(rows, "val/bits_per_byte"), strict=True) if math.isfinite(bits)]
    best, at = min(finite, default=(math.nan, math.nan))
    height = dict(zip(*points(rows, "val/loss"), strict=True)).get(at, math.nan)
    if math.isfinite(height):
        style: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "color": LIGHT.runs[1], "fontsize": 9}
        axes.annotate(f"{best:.3f} bits/byte", (at, height), (0, 12), **style)


def points(rows: Sequence[Row], key: str, x: str = "progress/tokens") -> Points:
    """The rows' values over an axis; a row without a finite place or without a number is left out; a value that is not finite is nan."""
    kept = [row for row in rows if _is_number(row.get(key)) and _is_number(row.get(x)) and math.isfinite(row[x])]
    return [row[x] for row in kept], [y if math.isfinite(y := row[key]) else math.nan for row in kept]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
