"""Formats numbers, durations, paths and text for the terminal.

Pure functions of their arguments; `short_path` also reads the working directory.
"""

import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from parallel.text import LONGEST_SHOWN, is_unseen, printable

SCALES = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))
SEPARATOR = " · "


def compact(n: int) -> str:
    """A size with one decimal: 3,369,792 -> '3.4 M'; 999 -> '999'."""
    for scale, letter in SCALES:
        if n >= scale:
            return f"{n / scale:.1f} {letter}"
    return str(n)


def count(n: float) -> str:
    """A number of tokens to three figures: 999, 2.05 k, 20 k, 102 k, 2.10 M, 12.3 M, 1.00 B."""
    if n < 1000:
        return f"{n:.0f}"
    for scale, letter in SCALES[:-1]:
        if n >= scale * 0.9995:
            return f"{three_figures(n / scale)} {letter}"
    return f"{n / 1000:.2f} k" if n < 9_995 else f"{n / 1000:.0f} k"


def flops(n: float) -> str:
    """Floating-point operations to three figures, as in 1.13e13."""
    return f"{n:.2e}".replace("e+", "e") if n else "0"


def plural(n: int, noun: str) -> str:
    """'1 rank', '2 ranks', '1,000 ranks'."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def three_figures(x: float) -> str:
    """2.10, 12.3, 123: three figures, never an exponent (x ≥ 1)."""
    return f"{x:.2f}" if x < 9.995 else f"{x:.1f}" if x < 99.95 else f"{x:,.0f}"


def missing(x: float | None) -> str:
    """What is shown for a value that is not a finite number: '–' for None, nan, inf or -inf; '' for a finite one."""
    return "–" if x is None else "" if math.isfinite(x) else f"{x}"


def _finite(format_number: Callable[[float], str]) -> Callable[[float | None], str]:
    """Decorates a format: None and non-finite values are shown as `missing` shows them."""

    @functools.wraps(format_number)
    def wrapped(x: float | None) -> str:
        return format_number(x) if x is not None and math.isfinite(x) else missing(x)

    return wrapped


@_finite
def loss(x: float) -> str:
    """Nats to three decimals: 7.512."""
    return f"{x:.3f}"


@_finite
def perplexity(x: float) -> str:
    """Whole above 100, then one more decimal per power of ten: 1830, 62.1, 9.87; 1.2e+07 from a million on."""
    return f"{x:.1e}" if x >= 999_999.5 else three_figures(x).replace(",", "")


@_finite
def figure(x: float) -> str:
    """An accuracy, a loss or a perplexity: three decimals below 10, then as a perplexity."""
    return f"{x:.3f}" if abs(x) < 9.9995 else perplexity(x)


@_finite
def rate(x: float) -> str:
    """A learning rate: 3.0e-03."""
    return f"{x:.1e}"


@_finite
def norm(x: float) -> str:
    """A gradient norm: 1.21, 43.2, 512; with an exponent below 0.01 and from 10,000 on."""
    return f"{x:.0e}" if 0 < x < 0.00995 or x >= 9_999.5 else three_figures(x).replace(",", "")


@_finite
def speed(x: float) -> str:
    """Tokens per second: 3,410, then 1.23 M."""
    return f"{x:,.0f}" if x < 999_999.5 else count(x)


@_finite
def memory(megabytes: float) -> str:
    """410 MB, 9,800 MB, 12.3 GB (1 GB = 1000 MB)."""
    return f"{megabytes:,.0f} MB" if megabytes < 9_999.5 else f"{three_figures(megabytes / 1000)} GB"


@_finite
def duration(seconds: float) -> str:
    """0:07, 2:51, 1:02:51, 3d 04:05: minutes and seconds; hours in front; from a day on days, hours and minutes."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    if hours < 1:
        return f"{minute}:{second:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours < 24 else f"{hours // 24}d {hours % 24:02}:{minute:02}"


def layout(
    pipe: int,
    data: int,
    tensor: int,
    zero_stage: int | None = None,
    *,
    sequence: bool = False,
    recompute: str = "none",
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
) -> str:
    """'pipe 1 × data 1 × tensor 2 · sequence parallel · ZeRO-2 · optimizer in host memory · full recomputation'.

    The only notation for a layout: wherever one is shown, it is written by this function.
    """
    words = [f"pipe {pipe} × data {data} × tensor {tensor}"]
    words += ["sequence parallel"] * (sequence and tensor > 1)
    words += [] if zero_stage is None else [f"ZeRO-{zero_stage}"]
    offloaded = [what for what, is_offloaded in (("optimizer", offload_optimizer), ("parameters", offload_parameters)) if is_offloaded]
    words += [f"{' and '.join(offloaded)} in host memory"] * bool(offloaded)
    words += [f"{recompute} recomputation"] * (recompute != "none")
    return SEPARATOR.join(words)


def short_path(path: Path) -> str:
    """The path as one would type it here: relative to the working directory if it lies below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def one_line(text: str, most: int | None = LONGEST_SHOWN) -> str:
    """The text on one line: single spaces, escapes of characters without a shape (`printable`), cut if it is longer than `most`."""
    return printable(" ".join(text.split()), most)


def json_line(value: object) -> str:
    """A value as JSON on one line, readable in any language; characters without a shape are JSON's own escapes, so nothing is lost."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return "".join(json.dumps(letter)[1:-1] if is_unseen(letter) else letter for letter in line)
