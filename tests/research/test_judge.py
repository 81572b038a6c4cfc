"""When a rank must leave: counted by hand, look by look."""

import signal
from types import SimpleNamespace

import pytest

from research.judge import ALONE_SECONDS, CLOSING_SECONDS, HUNG, PATIENCE, STEPS_OF_PATIENCE, Judge
from research.parents import LAUNCHER_GONE
from research.progress import Progress, Stage

HANG = 60.0


def judge(hang_seconds: float = HANG, gone: bool = False) -> tuple[Judge, Progress]:
    progress = Progress()
    return Judge(progress, SimpleNamespace(look=lambda: gone), hang_seconds), progress  # type: ignore[arg-type]


def looks(judge: Judge, limit: int = 1000) -> int:
    """How many looks of a second until there is a verdict; `limit` where there is none."""
    return next((number for number in range(1, limit) if judge.look(1.0)), limit)


def test_without_a_move_it_is_a_hang_after_hang_seconds() -> None:
    found, _ = judge()
    assert looks(found) == HANG + 1  # the first look sees the start
    assert found.look(1.0).code == HUNG


def test_a_move_begins_the_count_anew() -> None:
    found, progress = judge()
    for _ in range(5):
        assert all(found.look(1.0) is None for _ in range(int(HANG) - 1))
        progress.stepping(progress.step + 1)
    assert looks(found) == HANG + 1


@pytest.mark.parametrize("stage", [Stage.START, Stage.SAVING])
def test_work_of_any_length_is_no_hang_until_it_is_over(stage: Stage) -> None:
    found, progress = judge()
    with progress.work("saving", stage):
        assert looks(found) == 1000
    assert looks(found) == HANG + 1


def test_zero_is_off() -> None:
    assert looks(judge(hang_seconds=0.0)[0]) == 1000


@pytest.mark.parametrize(("stage", "patience"), PATIENCE.items())
def test_a_signal_that_leads_to_nothing_has_the_stages_patience(stage: Stage, patience: float) -> None:
    found, progress = judge(hang_seconds=0.0)
    progress.advance("something", stage)
    found.signal = signal.SIGUSR1
    assert looks(found) == patience
    verdict = found.look(1.0)
    assert verdict.code == 128 + signal.SIGUSR1 and verdict.why.startswith("SIGUSR1, but ")


def test_a_long_step_is_waited_for() -> None:
    found, progress = judge(hang_seconds=0.0)
    progress.stepping(1)
    progress.step_seconds = 100.0
    found.signal = signal.SIGTERM
    assert looks(found) == STEPS_OF_PATIENCE * 100


def test_a_checkpoint_is_waited_for_and_the_count_begins_after_it() -> None:
    found, progress = judge()
    found.signal = signal.SIGTERM
    with progress.work("saving", Stage.SAVING):
        assert looks(found) == 1000
    progress.advance("closing", Stage.LEAVING)
    assert looks(found) == PATIENCE[Stage.LEAVING]


@pytest.mark.parametrize(
    ("number", "gone", "reason"), [(15, True, LAUNCHER_GONE), (15, False, "SIGTERM"), (2, True, "SIGINT"), (0, True, "")]
)
def test_the_reason_tells_a_lost_launcher_from_a_wish(number: int, gone: bool, reason: str) -> None:
    assert judge(gone=gone)[0].reason_of(number) == reason


class Missed:
    """Others of whom rank 1 is silent, or gone."""

    def __init__(self, silence: float = 0.0, gone: bool = False) -> None:
        self.silence, self.gone = silence, gone

    def lost(self) -> dict:
        return {1: None} if self.gone else {}

    def silent(self, seconds: float) -> set[int]:
        return {1} if self.silence >= seconds else set()


def test_a_silent_rank_is_a_hang_even_in_work_of_any_length() -> None:
    found, progress = judge()
    with progress.work("saving", Stage.SAVING):
        found.others = Missed(silence=HANG - 1)
        assert looks(found) == 1000
        found.others = Missed(silence=HANG)
        assert looks(found) == 1


@pytest.mark.parametrize(("stage", "seconds"), [(Stage.TRAINING, ALONE_SECONDS), (Stage.LEAVING, CLOSING_SECONDS)])
def test_a_lost_rank_leaves_the_main_thread_a_moment(stage: Stage, seconds: float) -> None:
    found, progress = judge()
    progress.advance("something", stage)
    found.others = Missed(gone=True)
    found._of_the_lost = lambda: SimpleNamespace(code=1)  # type: ignore[method-assign]
    assert looks(found) == seconds
