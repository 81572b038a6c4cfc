"""A disk that fills up under a run, and a run's folder that is deleted: said, recorded, and with a last checkpoint where there is room.

The disks are real: a tmpfs of a few megabytes in a mount namespace.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from research import ROOT
from research.cluster.exit_codes import DISK, TAKEN
from tests.research.helpers.launches import Place, _environment

IN_A_MOUNT_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def can_mount() -> bool:
    """Whether this user may mount a tmpfs in a namespace here."""
    try:
        mounts = [*IN_A_MOUNT_NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"]
        return subprocess.run(mounts, capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not can_mount(), reason="a tmpfs may not be mounted in a namespace here")]
CONSTANT = {"optimizer.decay": "constant", "optimizer.min_lr": 3e-3}
"""A longer or shorter run has the same steps."""
SETTINGS = {"schedule.steps": 2000, "schedule.validate_every": 0, "schedule.log_every": 1}


def under_trouble(place: Path, what: str, again: int = 0, **plan: Any) -> dict[str, Any]:
    """A run that meets this trouble after its fifth row, and, with `again`, its resumed launch to that step."""
    made = Place(place)
    settings = made.settings(SETTINGS | plan.pop("settings", {}))
    command = [sys.executable, "experiments/gpt_sotu/launch.py", *settings]
    plan = {"runs": str(made.runs), "megabytes": 4, "command": command, "what": what, "after_rows": 5, **plan}
    if again:
        plan["again"] = [*command, "--resume", "auto", "--schedule.steps", str(again)]
    driver = [*IN_A_MOUNT_NAMESPACE, sys.executable, "-m", "tests.research.helpers.full_disk", json.dumps(plan)]
    done = subprocess.run(driver, cwd=ROOT, env=_environment(made), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_disk_that_is_full_to_the_last_byte(tmp_path: Path) -> None:
    """No row, no checkpoint, no run.json can be written: the terminal and the lock's record have the reason, for every verb."""
    left = under_trouble(tmp_path, "fill", settings={"sample.every": 1, "sample.tokens": 1, "track.mode": "offline"})
    assert left["code"] == DISK and left["seconds"] < 60
    assert "Traceback" not in left["err"] + left["out"] + left["log"], left["err"]
    error = next(line for line in left["err"].splitlines() if line.startswith("error"))
    assert ".jsonl cannot be written (No space left on device), and no last checkpoint could be written: " in error
    assert "step_" in error and "free → make room, or write elsewhere" in error
    assert ".jsonl cannot be written (No space left on device): the run stops, with a last checkpoint if there is room" in left["out"]
    assert left["written"]["status"] == "running" and left["run"]["status"] == left["status"] == "failed"
    assert left["run"]["code"] == DISK and left["run"]["reason"].startswith(error.removeprefix("error  ")[:100])
    assert left["torn"] == [] and left["temporary"] == [] and left["steps"] == list(range(1, len(left["steps"]) + 1))


def test_a_last_checkpoint_is_written_where_there_is_room_and_no_row_is_lost(tmp_path: Path) -> None:
    """The checkpoints are on another disk. The row that the full disk has refused is in the checkpoint, and is written at the resume."""
    left = under_trouble(tmp_path, "fill", other_disk_for_checkpoints=True, again=12, settings=CONSTANT)
    (saved,) = [name for name in left["checkpoints"] if name.startswith("step_")]
    step = int(saved.removeprefix("step_"))
    assert left["code"] == DISK and left["status"] == "failed" and "make room on its disk, then go on with --resume auto" in left["err"]
    assert left["steps"][-1] < step, "the disk was not full"
    again = left["again"]
    assert again["code"] == 0, again["err"]
    assert again["steps"] == list(range(1, max(12, step) + 1)) and again["status"] == "finished" and "code" not in again["written"]
    assert again["losses"][: len(left["losses"])] == left["losses"]


def test_a_folder_that_is_deleted_under_its_run_ends_it_with_a_checkpoint(tmp_path: Path) -> None:
    """Within seconds; the folder is made again with what the run still knows, so that it can go on."""
    left = under_trouble(tmp_path, "delete", again=20, settings=CONSTANT)
    assert left["code"] == TAKEN and left["seconds"] < 60
    assert "error  the folder was deleted under gpt_sotu-" in left["err"] and "Traceback" not in left["err"] + left["out"]
    assert "was deleted while the run went on: its earlier rows and checkpoints are lost" in left["err"].splitlines()[-1]
    assert left["status"] == "failed" and left["run"]["code"] == TAKEN and left["config"]
    (saved,) = [name for name in left["checkpoints"] if name.startswith("step_")]
    again = left["again"]
    assert again["code"] in (0, 2) and f"resume   step {int(saved.removeprefix('step_'))} of gpt_sotu-" in again["out"] + again["err"]


def test_there_is_room_for_what_retention_keeps_or_the_run_does_not_begin(tmp_path: Path) -> None:
    """keep_last = 2 needs three at once: two fit, and the run is refused before its first step."""
    made = Place(tmp_path)
    command = [sys.executable, "experiments/gpt_sotu/launch.py", *made.settings({"checkpoints.every": 1})]
    script = 'mount -t tmpfs -o size="$0"k none "$1" && shift && exec "$@"'
    made.runs.mkdir()

    def run(kilobytes: int) -> subprocess.CompletedProcess[str]:
        mounted = [*IN_A_MOUNT_NAMESPACE, "sh", "-c", script, str(kilobytes), str(made.runs), *command]
        return subprocess.run(mounted, cwd=ROOT, env=_environment(made), capture_output=True, text=True, timeout=300)

    refused = run(1000)
    assert (
        refused.returncode == DISK and "a checkpoint needs 0.4 MB, and 3 new ones at once, with checkpoints.keep_last = 2" in refused.stderr
    )
    assert "→ make room, keep fewer, or set track.runs to another disk" in refused.stderr
    assert run(1800).returncode == 0


@pytest.mark.parametrize("kilobytes", [8, 16])
def test_a_new_run_whose_folder_does_not_fit_is_refused_on_both_ranks_and_leaves_nothing(kilobytes: int, tmp_path: Path) -> None:
    """The disk has room for the lock, or for some of the files: both ranks say why, and there is nothing to resume."""
    made = Place(tmp_path)
    made.runs.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "experiments/gpt_sotu/launch.py"]
    script = 'mount -t tmpfs -o size="$0"k none "$1"; runs=$1; shift; "$@"; find "$runs" -mindepth 1'
    mounted = [*IN_A_MOUNT_NAMESPACE, "sh", "-c", script, str(kilobytes), str(made.runs), *launch, *made.settings({"parallel.tensor": 2})]
    done = subprocess.run(mounted, cwd=ROOT, env=_environment(made), capture_output=True, text=True, timeout=300)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error  ")]
    assert "cannot be written (No space left on device) → make room on its disk, then launch again" in error
    assert "gloo" not in done.stderr and "RuntimeError" not in done.stderr and f"exitcode  : {DISK} " in done.stderr, done.stderr
    assert str(made.runs) not in done.stdout.replace(error, ""), "the folder of the run is left behind"
