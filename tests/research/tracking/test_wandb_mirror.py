"""The W&B mirror: calls with a time limit, and an offline run that is written again from the run's own files where the first one broke."""

import signal
import time
from pathlib import Path

import pytest

from research.tracking import metrics, run_folder
from research.tracking.metrics import JsonLines
from research.tracking.wandb_mirror import call_with_timeout, replacing, rows, sample_row
from tests.research.tracking.test_tracker import LATER, ROWS, SAMPLES, inspected, launch, of, tables, untabled

LONG = 30.0


def test_a_result_or_none():
    assert call_with_timeout(lambda: 3, LONG) == 3
    assert call_with_timeout(lambda: 1 / 0, LONG) is None


def test_what_takes_too_long_is_left():
    began = time.monotonic()
    assert call_with_timeout(lambda: time.sleep(LONG), 0.1) is None
    assert call_with_timeout(lambda: time.sleep(LONG), -1.0) is None  # what is left of a time that is up
    assert time.monotonic() - began < LONG / 2


def row(step: int, **more: object) -> dict[str, object]:
    return {"progress/step": step, "progress/tokens": 100 * step} | more


def test_metrics_and_samples_come_in_the_order_of_steps(tmp_path: Path) -> None:
    folder = run_folder.create(tmp_path, "a")
    for path, lines in (
        (folder.metrics, [row(1, x=1), row(2, x=2), row(2, x=3), row(3, x=4)]),
        (folder.samples, [row(2, prompt="p", text="q")]),
    ):
        file = JsonLines(path)
        for line in lines:
            file.write(line)
        file.close()
    first = [row(1, x=1), row(2, x=2), row(2, x=3)]
    assert rows(folder) == [*first, row(2, **{"sample/prompt": "p", "sample/text": "q"}), row(3, x=4)]
    assert sample_row(row(2, prompt="p")) == row(2, **{"sample/prompt": "p"})


def test_without_files_there_are_no_rows(tmp_path: Path) -> None:
    assert rows(run_folder.create(tmp_path, "a")) == []


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    for name in ("offline-run-1-a", "offline-run-2-a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows").write_text(name)
    return tmp_path / "offline-run-2-a"


@pytest.mark.parametrize("name", ["offline-run-2-a", "offline-run-3-a"])
def test_the_new_one_takes_the_place_of_the_broken_one(name: str, broken: Path) -> None:
    with replacing(broken):
        (broken.parent / name).mkdir()
    assert {path.name for path in broken.parent.iterdir()} == {"offline-run-1-a", name}
    assert list((broken.parent / name).iterdir()) == []


@pytest.mark.parametrize("name", ["offline-run-2-a", "offline-run-3-a"])
def test_the_broken_one_is_back_where_the_new_one_fails(name: str, broken: Path) -> None:
    with pytest.raises(KeyError), replacing(broken):
        (broken.parent / name).mkdir()
        raise KeyError
    assert {path.name for path in broken.parent.iterdir()} == {"offline-run-1-a", "offline-run-2-a"}
    assert (broken / "rows").read_text() == "offline-run-2-a"


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_an_offline_run_whose_process_died_is_written_again(number: int, tmp_path: Path) -> None:
    told, errors = launch(tmp_path, kill=int(number))
    folder = told["folder"]
    assert told["notes"] == [] and errors == ""
    assert [path.name for path in folder.wandb.iterdir() if "offline-run" in path.name] == [(folder.wandb / "latest-run").resolve().name]
    later = [LATER] if number == signal.SIGKILL else []
    assert repr(list(metrics.read(folder.metrics))) == repr([*ROWS, *later])
    first, wild, *others, _, _, sample = untabled(folder)
    assert [first, *others] == [ROWS[0], ROWS[2], *later]
    assert tables(folder)[-1]["data"] == [[*row.values()] for row in SAMPLES]
    assert (wild["train/loss"], wild["train/grad_norm"]) == ("NaN", "Infinity") and sample["sample/text"] == "of the United States"
    (record,) = of(inspected(folder), "run")
    assert record["run_id"] == folder.title and record["run_group"] == "gpt_sotu" and "model" in record["config"]["update"]
    assert {"train/*", "val/*"} <= {metric.get("glob_name") for metric in of(inspected(folder), "metric")}
    assert [ended["exit_code"] for ended in of(inspected(folder), "exit")] == [0]


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_dead_wandb_process_costs_the_mirror_at_most(number: int, tmp_path: Path) -> None:
    told, errors = launch(tmp_path, kill=int(number), again=False)
    assert len(told["notes"]) == 1 and "metrics.jsonl has every row" in told["notes"][0] and "Traceback" not in errors
    assert len(list(metrics.read(told["folder"].metrics))) == len(ROWS) + (number == signal.SIGKILL)
    assert len(list(metrics.read(told["folder"].samples))) == len(SAMPLES)
    assert len([path for path in told["folder"].wandb.iterdir() if "offline-run" in path.name]) == 1
