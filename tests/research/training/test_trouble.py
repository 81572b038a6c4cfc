"""The end of a run whose disk refuses a row after which no step follows: it is said, and the exit code is that of a full disk."""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from parallel.errors import DiskRefuses
from research.cluster.exit_codes import DISK, WATCHED
from research.reliability.signals import SIGNALS, Stop
from research.tracking import run_folder
from research.tracking.metrics import JsonLines
from research.tracking.run_folder import FAILED, INTERRUPTED
from research.training.loop import alert_of_end
from tests.harness import run_ranks
from tests.research.helpers.small_runs import Stage, nan_from_step_5_on

LAST = 4


@pytest.fixture
def stop() -> Iterator[Stop]:
    """A Stop whose signal handlers are taken back."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield Stop()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def alerts_at_the_end(stop: Stop, status: str, failure: str | None = None) -> list[tuple[str, str, str]]:
    """What W&B is told of the end of a run after step 3 of 4."""
    told: list[tuple[str, str, str]] = []
    tracker = SimpleNamespace(alert=lambda *words: told.append(words))
    job = SimpleNamespace(experiment=SimpleNamespace(schedule=SimpleNamespace(steps=LAST)))
    run: Any = SimpleNamespace(stop=stop, failure=failure, step=3, job=job, tracker=tracker)
    alert_of_end(run, status)
    return told


def test_the_alert_of_a_run_that_a_full_disk_has_ended(stop: Stop) -> None:
    """The disk can refuse the last checkpoint, too, with an exception that leaves no sentence behind."""
    stop.demand(DISK)
    assert stop.signal == 0 and stop.trouble == DISK
    try:
        raise DiskRefuses("the disk is full → make room")
    except DiskRefuses:
        assert alerts_at_the_end(stop, FAILED) == [(FAILED, "after step 3 of 4: DiskRefuses: the disk is full → make room", "ERROR")]
    os.kill(os.getpid(), signal.SIGUSR1)
    assert alerts_at_the_end(stop, INTERRUPTED) == [(INTERRUPTED, "after step 3 of 4: SIGUSR1", "WARN")]


def agree_on_trouble() -> list[tuple[int, int]]:
    """(signal, trouble) of this rank after each of two looks: rank 1 finds a full disk, and rank 0 gets a signal."""
    stop, found = Stop(), []
    if dist.get_rank() == 1:
        stop.demand(DISK)
    else:
        os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(2):
        assert stop.agreed()
        found.append((stop.signal, stop.trouble))
    return found


def test_all_ranks_learn_of_a_trouble_and_a_signal_stays_a_signal() -> None:
    assert run_ranks(agree_on_trouble, 2) == [[(signal.SIGTERM, DISK)] * 2, [(0, DISK)] * 2]


def disk_refuses_the_last_row(rank: int) -> None:
    refuse_rows(lambda path, line: path.name == "metrics.jsonl" and f'"progress/step": {LAST}'.encode() in line)


def disk_refuses_the_closing_sample(rank: int) -> None:
    refuse_rows(lambda path, line: path.name == "samples.jsonl")


def refuse_rows(is_refused: Any) -> None:
    """From now on this process's disk refuses the rows for which `is_refused(path, line)`."""
    append = JsonLines._append

    def refuse(self: JsonLines, line: bytes) -> None:
        if is_refused(self._path, line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        append(self, line)

    JsonLines._append = refuse  # type: ignore[method-assign]


def disk_refuses_the_incident(rank: int) -> None:
    """The loss is NaN from step 5 on, and rank 0 cannot write that down."""
    from research.training import anomalies

    def refuse(folder: Any, incident: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.incidents))

    nan_from_step_5_on(rank)
    anomalies.keep = refuse


@pytest.mark.slow
def test_an_incident_that_the_disk_refuses_takes_no_rank_down(tmp_path: Path) -> None:
    ended = Stage(tmp_path).run("nan", 2, prelude=disk_refuses_the_incident, schedule={"steps": 6}, parallel={"tensor": 2})
    assert ended.codes == [WATCHED] * 2 and "Traceback" not in ended.said, ended.said
    assert "/incidents cannot be written (No space left on device)" in ended.said and "the loss is nan" in ended.said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forked ranks")
@pytest.mark.parametrize(("fault", "world"), [(disk_refuses_the_last_row, 2), (disk_refuses_the_closing_sample, 1)])
def test_a_row_that_is_refused_after_the_last_step_began_ends_the_run_with_the_code_of_a_full_disk(fault, world, tmp_path) -> None:
    """The checkpoint stands, nothing of the ending is said twice, and the resumed run writes the row."""
    settings: dict[str, Any] = {"schedule": {"steps": LAST, "validate_every": 0}, "parallel": {"tensor": world}}
    stage = Stage(tmp_path)
    ended = stage.run("full", world, prelude=fault, **settings)
    assert ended.codes == [DISK] * world, ended.said
    run = run_folder.read_run(ended.folder)
    assert run["status"] == FAILED and run["code"] == DISK and ".jsonl cannot be written (No space left on device)" in run["reason"]
    assert ended.said.count("\ndone ") == 1 and "Traceback" not in ended.said
    again = stage.run("full", world, resume="auto", **settings)
    assert again.codes == [0] * world, again.said
    assert list(again.rows()) == list(range(1, LAST + 1)) and again.folder.samples.read_bytes().count(b"\n") >= 1
    assert run_folder.read_run(again.folder)["status"] == "finished"
