"""A W&B run from the run folder's files: which rows it has, when they were logged, and how it takes the place of another."""

import datetime
from pathlib import Path

import pytest

from research.tracking import metrics, run_folder
from research.tracking.metrics import JsonLines
from research.tracking.wandb_record import Known, known, replacing, rows, sample_row, summary, with_times


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
    with replacing(broken.parent, [broken]):
        (broken.parent / name).mkdir()
    assert {path.name for path in broken.parent.iterdir()} == {"offline-run-1-a", name}
    assert list((broken.parent / name).iterdir()) == []


@pytest.mark.parametrize("name", ["offline-run-2-a", "offline-run-3-a"])
def test_the_broken_one_is_back_where_the_new_one_fails(name: str, broken: Path) -> None:
    with pytest.raises(KeyError), replacing(broken.parent, [broken]):
        (broken.parent / name).mkdir()
        raise KeyError
    assert {path.name for path in broken.parent.iterdir()} == {"offline-run-1-a", "offline-run-2-a"}
    assert (broken / "rows").read_text() == "offline-run-2-a"


def test_a_row_gets_the_time_at_which_it_was_logged() -> None:
    started = "2026-01-31T12:00:00+00:00"
    untimed, timed = with_times([row(0), row(1, **{"progress/seconds": 90.5})], {"started": started})
    assert datetime.datetime.fromtimestamp(timed["_timestamp"], datetime.UTC).isoformat() == "2026-01-31T12:01:30.500000+00:00"
    assert untimed == row(0)
    assert list(with_times([row(1, **{"progress/seconds": 90.5})], {})) == [row(1, **{"progress/seconds": 90.5})]


def test_a_row_without_seconds_gets_the_time_of_its_step() -> None:
    """A sample after the metrics of its step, one at a step without metrics, and the table, which comes last but is of step 2."""
    metric = [row(step, **{"progress/seconds": 10.0 * step}) for step in (1, 2, 4)]
    logged = [*metric[:2], row(2, sample=1), row(3, sample=2), metric[2], row(2, samples="table"), row(4, loss_curve="picture")]
    times = [timed["_timestamp"] for timed in with_times(logged, {"started": "1970-01-01T00:00:00+00:00"})]
    assert times == [10.0, 20.0, 20.0, 20.0, 40.0, 20.0, 40.0]


def test_the_summary_has_the_last_values_and_the_lowest_validation(tmp_path: Path) -> None:
    folder = run_folder.create(tmp_path, "a")
    file = JsonLines(folder.metrics)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5)):
        file.write(row(step, **{"val/loss": loss, "train/lr": 0.1 * step}))
    file.close()
    assert summary(folder) == row(3, **{"val/loss": {"min": 2.0, "last": 2.5}, "train/lr": 0.1 * 3})


def test_without_w_b_files_everything_is_missing(tmp_path: Path) -> None:
    folder = run_folder.create(tmp_path, "a")
    JsonLines(folder.metrics).write(row(1))
    found = known(folder, {"eval/x/accuracy": 0.5})
    assert found == Known((), 1, 1) and not found.complete and list(metrics.read(folder.metrics)) == [row(1)]
