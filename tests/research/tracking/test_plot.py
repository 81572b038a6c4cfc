"""The loss curve: a whole PNG from any number of rows, and a mean that does not lag."""

import math
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from research.tracking import plot
from research.tracking.metrics import JsonLines, read
from research.tracking.plot import DARK, LIGHT, NAMED, X_AXES, Curves, loss_curve, points, smooth


def rows(n):
    train = [{"progress/tokens": i * 100, "train/loss": 8 - i / n} for i in range(1, n + 1)]
    return train + [{"progress/tokens": n * 100, "val/loss": 7.5, "val/bits_per_byte": 2.5}] * (n > 1)


def drawn(tmp_path, logged):
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    file = JsonLines(metrics)
    for row in logged:
        file.write(row)
    loss_curve(metrics, picture, "gpt_$sotu-7f3a2c", "pipe 1 × data 1 × tensor 2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
    return matplotlib.image.imread(picture)


def blue(image):
    """How many pixels are of the training curve's colour."""
    return int((np.abs(image[..., :3] - np.array([0x3B, 0x6F, 0xB6]) / 255).max(-1) < 0.02).sum())


ODD = {
    "no rows": [],
    "only nan": [{"progress/tokens": 1, "train/loss": math.nan}],
    "only inf": [{"progress/tokens": 2, "val/loss": math.inf, "val/bits_per_byte": math.inf}],
    "no axis": [{"train/loss": 3.0}],
    "not a number": [{"progress/tokens": 1, "train/loss": "3.0"}, {"progress/tokens": True, "train/loss": 1.0}],
    "zero tokens": [{"progress/tokens": 0, "train/loss": 1.0}],
    "validation without bits": [{"progress/tokens": 9, "val/loss": 1.0}],
    "bits without validation": [{"progress/tokens": 9, "val/bits_per_byte": 1.0}],
}


@pytest.mark.parametrize("logged", ODD.values(), ids=ODD)
def test_odd_rows_never_fail(tmp_path, logged):
    assert drawn(tmp_path, logged).shape == (720, 1200, 4)


@pytest.mark.parametrize("n", [1, 2, 300])
def test_rows_become_a_curve(tmp_path, n):
    image = drawn(tmp_path, rows(n))
    assert image.shape == (720, 1200, 4) and (image[..., :3].std() > 0.02)
    assert (blue(image) > 500) == (n > 1)  # a lone row is one faint point


def test_no_metrics_file_at_all(tmp_path):
    loss_curve(tmp_path / "none.jsonl", tmp_path / "loss.png", "a")
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_what_goes_wrong_is_logged_not_raised(tmp_path, caplog):
    loss_curve(tmp_path / "none.jsonl", tmp_path / "missing" / "loss.png", "a")
    assert "loss.png could not be drawn" in caplog.text and "FileNotFoundError" in caplog.text


def test_a_nan_is_a_gap_not_a_lie(tmp_path):
    x, y = points([{"progress/tokens": 1, "train/loss": math.inf}, {"progress/tokens": 2, "train/loss": 3.0}], "train/loss")
    assert x == [1, 2] and math.isnan(y[0]) and y[1] == 3.0


def test_smoothing_keeps_a_line_and_averages_the_middle():
    assert smooth([1.0, 2.0, 3.0, 4.0, 5.0], 2) == [1.0, 2.0, 3.0, 4.0, 5.0]
    noisy = np.random.default_rng(0).normal(size=50)
    assert smooth(list(noisy), 3)[20] == pytest.approx(noisy[17:24].mean())
    assert smooth([1.0, math.nan, 4.0], 1)[1] == 2.5 and math.isnan(smooth([math.nan], 1)[0])


@pytest.mark.slow
def test_nothing_is_printed_where_home_cannot_be_written(tmp_path):
    imports = "from pathlib import Path; from research.tracking.plot import loss_curve"
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"progress/step": 1, "train/loss": 2.0}\n{"progress/step": 2, "train/loss": 1.0}\n')
    code = f"{imports}; p = Path({str(metrics)!r}); loss_curve(p, p.with_name('a.png'), 'a')"
    home = {"PATH": "/usr/bin:/bin", "HOME": "/dev/null/nowhere"}
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=home, timeout=120)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def lines_of(axes):
    """{colour: the y values of each line of that colour}."""
    found = {}
    for line in axes.lines:
        found.setdefault(line.get_color(), []).append(list(line.get_ydata()))
    return found


def logged(n, offset=0.0):
    """n rows of training, with noise that smoothing would remove, and one validation."""
    train = [
        {"progress/step": i, "progress/tokens": 10 * i, "progress/seconds": 2.0 * i, "train/loss": 5 + offset + i % 2, "train/lr": 1e-3}
        for i in range(1, n + 1)
    ]
    return [*train, {"progress/step": n, "progress/tokens": 10 * n, "progress/seconds": 2.0 * n, "val/loss": 5.25 + offset}]


def drawn_figure(*runs, panels=("loss",), x="tokens", theme=LIGHT):
    return plot.draw([Curves(f"run {i}", rows) for i, rows in enumerate(runs)], [NAMED[name] for name in panels], X_AXES[x], theme, "t")


def test_numbers_of_any_size_are_drawn(tmp_path):
    """A stranger's metrics.jsonl: the points whose place is not finite are left out, and nothing overflows."""
    path = tmp_path / "metrics.jsonl"
    huge = "9" * 400
    path.write_text(f'{{"progress/tokens": {huge}, "train/loss": 2}}\n{{"progress/tokens": 5, "train/loss": {huge}}}\n')
    assert points([*read(path)], "train/loss") == ([5], [pytest.approx(math.nan, nan_ok=True)])
    loss_curve(path, tmp_path / "loss.png", "t")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_few_rows_are_drawn_raw_and_many_as_a_mean_that_is_named():
    (few,) = drawn_figure(logged(39)).axes
    assert lines_of(few)[LIGHT.runs[0]] == [[5 + i % 2 for i in range(1, 40)]]
    assert "line: training, every row · dots: validation" in [text.get_text() for text in few.texts]
    (many,) = drawn_figure(logged(200)).axes
    raw, mean = lines_of(many)[LIGHT.runs[0]]
    assert raw == [5 + i % 2 for i in range(1, 201)]
    assert mean[100] == pytest.approx(sum(raw[90:111]) / 21)  # 200 / 20 = 10 neighbours on either side
    assert "line: mean of 21 rows, faint: every row · dots: validation" in [text.get_text() for text in many.texts]


def test_every_run_has_a_colour_of_its_own_and_a_name_in_the_legend():
    figure = drawn_figure(logged(5), logged(9, 1.0), panels=("loss", "lr"), x="steps", theme=DARK)
    loss, lr = figure.axes
    assert {color: len(lines) for color, lines in lines_of(loss).items()} == {DARK.runs[0]: 2, DARK.runs[1]: 2}  # training, validation
    assert [line.get_color() for line in lr.lines] == [DARK.runs[0], DARK.runs[1]]
    (legend,) = figure.legends
    named = {text.get_text(): line.get_color() for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)}
    assert named == {"run 0": DARK.runs[0], "run 1": DARK.runs[1]}
    assert loss.get_xlim() == lr.get_xlim() == (0, 9 * 1.02) and figure.get_facecolor()[:3] == matplotlib.colors.to_rgb(DARK.background)


def test_more_runs_than_colours_differ_in_their_dashes():
    figure = drawn_figure(*[logged(3) for _ in range(len(LIGHT.runs) + 2)], panels=("lr",))
    styles = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines]
    assert len(set(styles)) == len(styles) == len(LIGHT.runs) + 2


def test_tasks_have_their_standard_errors():
    rows = [{"progress/tokens": 10 * i, "eval/agreement/accuracy": 0.5 + i / 10, "eval/agreement/accuracy_stderr": 0.05} for i in (1, 2)]
    assert plot.keys_of(rows) == ["eval/agreement/accuracy"]
    (axes,) = plot.draw([Curves("a", rows)], [plot.panel_of("eval/agreement/accuracy")], X_AXES["tokens"], LIGHT, "t").axes
    (bars,) = [segments for collection in axes.collections for segments in [collection.get_segments()]]
    assert [bar[:, 1].tolist() for bar in bars] == [pytest.approx([0.55, 0.65]), pytest.approx([0.65, 0.75])]


@pytest.mark.parametrize(("x", "farthest", "ticks"), [("tokens", 90, "90"), ("seconds", 18, "0:18")])
def test_the_x_axis_is_the_one_asked_for(x, farthest, ticks):
    axes = drawn_figure(logged(9), x=x).axes[0]
    assert axes.lines[0].get_xdata()[-1] == farthest and axes.get_xlabel() == X_AXES[x].label
    assert axes.xaxis.get_major_formatter()(farthest) == ticks


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_the_ending_decides_the_format_and_the_file_is_the_same_each_time(tmp_path, name):
    written = []
    for _ in range(2):
        plot.save(drawn_figure(logged(3)), tmp_path / name)
        written.append((tmp_path / name).read_bytes())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert written[0].startswith(b"\x89PNG") if name == "a.png" else b"<svg" in written[0]
    if name == "a.png":
        assert written[0] == written[1]
