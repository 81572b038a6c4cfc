"""How much room a run's checkpoints need, compared with a walk through saves and retention on a real disk."""

from pathlib import Path

import pytest

from parallel.checkpoint.folder import retain
from research.config.schema import Checkpoints
from research.training import room
from tests.parallel.helpers.checkpoints import save

PLANS = [(0, 10, 3, [3, 6, 9, 10]), (0, 9, 3, [3, 6, 9]), (4, 10, 3, [6, 9, 10]), (6, 10, 3, [9, 10]), (0, 5, 0, [5]), (5, 5, 2, [])]
KEPT = [((), 2, 0), ((1, 2), 2, 0), ((1, 2, 3), 1, 0), ((2,), 1, 4), ((3,), 3, 2), ((), 1, 1)]


@pytest.mark.parametrize(("step", "steps", "every", "planned"), [*PLANS, (0, 2, 7, [2])])
def test_a_run_saves_at_each_multiple_and_at_its_end(step: int, steps: int, every: int, planned: list[int]) -> None:
    assert room.planned_saves(step, steps, every) == planned


@pytest.mark.parametrize(("there", "keep_last", "keep_every"), KEPT)
def test_the_room_is_what_saving_and_deleting_takes(there: tuple[int, ...], keep_last: int, keep_every: int, tmp_path: Path) -> None:
    """Each checkpoint is complete before an older one is deleted."""
    for step in there:
        save(tmp_path / f"step_{step:06d}", step=step)
    before = room.sizes(tmp_path)
    planned = [4, 5, 6, 7, 8, 9]
    save(tmp_path / "measure", step=1)
    size = sum(file.stat().st_size for file in (tmp_path / "measure").iterdir())
    most = 0
    for step in planned:
        save(tmp_path / f"step_{step:06d}", step=step)
        most = max(most, sum(room.sizes(tmp_path).values()) - sum(before.values()))
        retain(tmp_path, keep_last, keep_every)
    found = room.bytes_needed(before, planned, size, Checkpoints(every=1, keep_last=keep_last, keep_every=keep_every))
    assert abs(found - most) < size / 20  # a manifest is longer by a digit or two


def test_a_checkpoint_that_is_saved_again_needs_its_room_twice() -> None:
    keep = Checkpoints(every=5, keep_last=1)
    assert room.bytes_needed({5: 100}, [5], 100, keep) == 100
    assert room.bytes_needed({}, [5, 10, 15], 100, keep) == 200 and room.bytes_needed({}, [], 100, keep) == 0
