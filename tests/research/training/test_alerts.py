"""Alerts of W&B: a run that stops, or skips a step that is not finite, says so once, in the offline run's own file."""

from collections.abc import Callable
from typing import Any

import pytest

from research.cluster.exit_codes import WATCHED
from tests.research.helpers import small_runs
from tests.research.helpers.small_runs import Stage
from tests.research.tracking.test_tracker import inspected, of

OFFLINE: dict[str, Any] = {
    "track": {"mode": "offline"},
    "schedule": {"steps": 7},
    "checkpoints": {"every": 2, "keep_last": 1, "keep_every": 4},
}


def crashes_in_step_6(rank: int) -> None:
    """An error that is no user's, in the middle of training."""
    small_runs.before_step(rank, 6, crash)


def crash(monitor: Any) -> None:
    raise RuntimeError("a fault of ours")


CASES: list[tuple[Callable[[int], None] | None, dict[str, Any], int, list[tuple[str, str, str]], list[int]]] = [
    (None, {}, 0, [], [4, 7]),
    (small_runs.stopped_in_step_6, {}, 138, [("interrupted", "WARN", "after step 6 of 7: SIGUSR1")], [4, 6]),
    (crashes_in_step_6, {}, 1, [("failed", "ERROR", "after step 5 of 7: RuntimeError: a fault of ours")], [4]),
    (
        small_runs.nan_from_step_5_on,
        {},
        WATCHED,
        [("failed", "ERROR", "after step 5 of 7: step 5: the loss is nan")],
        [4, 5],
    ),
    (
        small_runs.nan_from_step_5_on,
        {"watch": {"non_finite": "skip"}},
        0,
        [("skipped a step that is not finite", "WARN", f"step {step}: the loss is nan") for step in (5, 6, 7)],
        [4, 7],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "settings", "code", "alerts", "kept"), CASES)
def test_alerts_and_references_of_a_run(
    fault: Callable[[int], None] | None, settings: dict[str, Any], code: int, alerts: list, kept: list[int], tmp_path
) -> None:
    """`kept`: the steps of the checkpoints that W&B refers to, in the order of telling: those that are kept for good at once."""
    ended = Stage(tmp_path).run("watched", 1, prelude=fault, **OFFLINE | settings)
    assert ended.codes == [code], ended.said
    records = inspected(ended.folder)
    told = [(alert["title"].partition(" · ")[0], alert["level"], alert["text"]) for alert in of(records, "alert")]
    assert [alert[:2] for alert in told] == [alert[:2] for alert in alerts]
    for (_, _, text), (_, _, begins) in zip(told, alerts, strict=True):
        assert text.startswith(begins), text
    checkpoints = [one for one in of(records, "artifact") if one["type"] == "model"]
    assert [[f"step_{step:06d}"] for step in kept] == [[name for name in one["aliases"] if name != "latest"] for one in checkpoints]
