"""A run that is process 1 of a pid namespace of its own, as in a container: killed there, it is resumed there, and from outside."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.checkpoint.folder import newest_complete, step_of
from parallel.files import read_json
from research.tracking import run_folder
from research.tracking.lock_record import newest
from research.tracking.run_folder import RunFolder
from tests.parallel.test_process_identity import can_unshare
from tests.research.helpers.launches import Place, launch, run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not can_unshare(), reason="a pid namespace may not be made here")]
SAVES = dict(checkpoints__every=2, schedule__validate_every=0, schedule__log_every=2)


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[tuple[Place, RunFolder]]:
    """A run that was killed in its container after its first checkpoints; refused while it lived."""
    place = Place(tmp_path)
    running = launch(place, "container", schedule__steps=100_000, **SAVES)
    try:
        running.wait_for("step_000004")
        (folder,) = run_folder.every(place.runs)
        began = read_json(folder.run)
        assert (began["pid"], began["status"]) == (1, "running")
        refused = run(place, resume="auto", schedule__steps=8, **SAVES)  # its number means nothing here, its heartbeat does
        owner = newest(folder.lock)
        assert owner and str(owner).startswith(f"process 1 on {began['host']}, since ")
        assert f"is running ({owner}): it cannot be seen from here, but it holds the lock → " in refused.err and refused.code == 2
        running.roles()["rank 0"].send_signal(signal.SIGKILL)
    finally:
        running.kill()
    assert read_json(folder.run)["status"] == "running"
    yield place, folder


@pytest.mark.parametrize("launcher", ["container", "python"])
def test_a_run_that_was_killed_as_process_1_is_resumed(killed: tuple[Place, RunFolder], launcher: str) -> None:
    """In a new container, where process 1 is the launch itself, and outside, where it is a stranger."""
    place, folder = killed
    newest = newest_complete(folder.checkpoints)
    assert newest is not None
    resumed = run(place, launcher, resume="auto", schedule__steps=step_of(newest) + 2, **SAVES)
    assert resumed.code == 0, resumed.err
    assert f"resume   step {step_of(newest)} of {folder.title}, {newest.name}" in resumed.out
    ended = read_json(folder.run)
    assert ended["status"] == "finished" and (ended["pid"] == 1) == (launcher == "container")
