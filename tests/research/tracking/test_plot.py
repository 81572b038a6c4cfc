"""The loss curve: a whole PNG from any number of rows, and a mean that does not lag."""

import math
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from research.tracking.metrics import JsonLines
from research.tracking.plot import _points, loss_curve, smooth


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
    x, y = _points([{"progress/tokens": 1, "train/loss": math.inf}, {"progress/tokens": 2, "train/loss": 3.0}], "train/loss")
    assert x == [1, 2] and math.isnan(y[0]) and y[1] == 3.0


def test_smoothing_keeps_a_line_and_averages_the_middle():
    assert smooth([1.0, 2.0, 3.0, 4.0, 5.0], 2) == [1.0, 2.0, 3.0, 4.0, 5.0]
    noisy = np.random.default_rng(0).normal(size=50)
    assert smooth(list(noisy), 3)[20] == pytest.approx(noisy[17:24].mean())
    assert smooth([1.0, math.nan, 4.0], 1)[1] == 2.5 and math.isnan(smooth([math.nan], 1)[0])


def test_nothing_is_printed_where_home_cannot_be_written(tmp_path):
    imports = "from pathlib import Path; from research.tracking.plot import loss_curve"
    code = f"{imports}; p = Path({str(tmp_path)!r}); loss_curve(p, p / 'a.png', 'a')"
    home = {"PATH": "/usr/bin:/bin", "HOME": "/dev/null/nowhere"}
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=home, timeout=120)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
