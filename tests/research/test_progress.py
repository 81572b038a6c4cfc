"""What the main thread says it does is what another thread reads."""

import pytest

from research.progress import Progress, Stage


def test_every_call_is_a_move_and_the_last_one_is_what_it_does() -> None:
    progress = Progress()
    assert (progress.stage, progress.moves) == (Stage.START, 0)
    progress.advance("building the engine")
    assert (progress.doing, progress.stage, progress.moves) == ("building the engine", Stage.START, 1)
    progress.stepping(5)
    assert (progress.doing, progress.stage, progress.step, progress.moves) == ("step", Stage.TRAINING, 5, 2)
    progress.advance("validation")
    assert (progress.doing, progress.stage, progress.step, progress.moves) == ("validation", Stage.TRAINING, 5, 3)


def test_the_time_of_a_step_is_measured_where_nothing_else_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 13.0, 50.0, 54.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    progress = Progress()
    for expected in (0.0, 3.0):
        progress.stepping(1)
        assert progress.step_seconds == expected
    progress.advance("validation")  # its time is no step's
    for expected in (3.0, 4.0):
        progress.stepping(1)
        assert progress.step_seconds == expected


def test_work_is_busy_until_it_is_over_however_it_ends() -> None:
    progress = Progress()
    progress.stepping(1)
    with pytest.raises(ValueError), progress.work("saving", Stage.SAVING):
        assert (progress.stage, progress.busy, progress.doing) == (Stage.SAVING, 1, "saving")
        with progress.work("one file"):
            assert (progress.stage, progress.busy) == (Stage.SAVING, 2)
        raise ValueError
    assert (progress.stage, progress.busy) == (Stage.TRAINING, 0)
