"""A real Slurm of one node takes the script that `cluster` prints, and runs it through preemption, requeue and the time limit.

After each, the run has all its rows once, and every loss is that of an undisturbed run, bit for bit. Two ranks with one thread each.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from parallel.checkpoint.folder import latest, step_of
from research import ROOT
from research.tracking import metrics
from research.tracking.run_folder import RunFolder, of_experiment
from tests.research.helpers import launches
from tests.research.helpers.launches import Ended, Place
from tests.research.helpers.slurm import CPUS, Slurm, missing, one_node

pytestmark = pytest.mark.slow
STEPS = 100
SETTINGS = {"schedule.steps": STEPS, "schedule.batch_size": 64, "schedule.validate_every": 0, "checkpoints.every": 20}
"""Sixteen micro-batches a step and rank: the run must last until Slurm does something to it."""
LIMIT = 600.0


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if reason := missing():
        pytest.skip(f"no Slurm here: {reason}")
    with one_node() as slurm:
        yield slurm


@pytest.fixture(scope="module")
def prepared(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The place of the undisturbed run, whose prepared text the others share."""
    return Place(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def whole(prepared: Place) -> Ended:
    """The run by `deepspeed`, without Slurm."""
    settings = {name.replace(".", "__"): value for name, value in SETTINGS.items()}
    ended = launches.run(prepared, "deepspeed", 2, environ={"OMP_NUM_THREADS": "1"}, **settings)
    assert ended.code == 0 and len(losses(ended.folder)) == STEPS, ended.err
    return ended


class Job:
    """A job of the script that `cluster` prints, submitted as it is; only its log goes to another folder."""

    def __init__(self, slurm: Slurm, place: Place, folder: Path, *options: str, submit: tuple[str, ...] = (), **settings: Any) -> None:
        """`options` are those of the verb, `submit` those of sbatch."""
        self.slurm, self.runs, self.log = slurm, folder / "runs", folder / "log.txt"
        here = SETTINGS | {"track.runs": self.runs} | {name.replace("__", "."): value for name, value in settings.items()}
        words = ["experiments/gpt_sotu", "--slurm", "--nodes", "1", "--gpus", "2", "--cpu-only", "--cpus", "1", *options]
        command = [sys.executable, "-m", "research", "cluster", *words, *place.settings(here)]
        self.script = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        file = folder / "job.sh"
        file.write_text(self.script)
        slurm.command("sbatch", "--test-only", str(file))  # sbatch's own parser, and whether the node could ever run it
        slurm.environ["HOME"] = str(place.home)
        self.number = slurm.command("sbatch", "--parsable", f"--output={self.log}", *submit, str(file), cwd=folder).strip()

    @property
    def folder(self) -> RunFolder:
        """The one run that the job has made."""
        (folder,) = of_experiment(self.runs / "gpt_sotu")
        return folder

    def reached(self, step: int) -> bool:
        """Whether the run has come to this step."""
        assert self.state["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), self.said()
        return any(row["progress/step"] >= step for folder in of_experiment(self.runs / "gpt_sotu") for row in metrics.read(folder.metrics))

    @property
    def state(self) -> dict[str, str]:
        return self.slurm.job(self.number)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else "no log"

    def ended(self, *states: str) -> dict[str, str]:
        """Waits for the job's last end. A requeued job would wait for two minutes: here it starts after two seconds.

        Not at once: slurmd refuses ("Job credential revoked") what begins in the second in which it has ended the job.
        """

        def over() -> bool:
            state = self.state
            if state["JobState"] == "PENDING" and state["Reason"] == "BeginTime":
                time.sleep(2)
                self.slurm.command("scontrol", "update", f"JobId={self.number}", "StartTime=now", check=False)
            return state["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

        until(over, self.said)
        assert self.state["JobState"] in states, self.said()
        return self.state


def until(happened: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    deadline = time.monotonic() + LIMIT
    while not happened():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.2)


def losses(folder: RunFolder) -> list[tuple[int, str]]:
    return [(row["progress/step"], row["train/loss"].hex()) for row in metrics.read(folder.metrics) if "train/loss" in row]


def assert_nothing_is_lost(job: Job, whole: Ended, segments: int) -> None:
    assert losses(job.folder) == losses(whole.folder), job.said()
    run = json.loads(job.folder.run.read_text())
    assert run["status"] == "finished" and len(run.get("segments", [run])) == segments
    assert step_of(latest(job.folder.checkpoints)) == STEPS


def test_srun_is_a_launcher_like_the_others(slurm: Slurm, prepared: Place, whole: Ended, tmp_path: Path) -> None:
    """Two tasks of a real srun, whose variables nobody has made up."""
    settings = prepared.settings(SETTINGS | {"track.runs": tmp_path})
    environ = slurm.environ | {"OMP_NUM_THREADS": "1", "HOME": str(prepared.home)}
    command = ["srun", "--ntasks=2", sys.executable, "experiments/gpt_sotu/launch.py", *settings]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    (folder,) = of_experiment(tmp_path / "gpt_sotu")
    assert losses(folder) == losses(whole.folder)


def test_a_preempted_job_saves_is_requeued_and_loses_nothing(slurm: Slurm, prepared: Place, whole: Ended, tmp_path: Path) -> None:
    """A job of a partition with higher priority needs the whole node. The ranks get SIGTERM, save, and end by themselves with 143."""
    job = Job(slurm, prepared, tmp_path, "--partition", "low")
    until(lambda: job.reached(25), job.said)
    other = slurm.command("sbatch", "--parsable", "--partition=high", f"--ntasks={CPUS}", "--output=/dev/null", "--wrap=sleep 1").strip()
    assert slurm.wait(other, "COMPLETED")["Restarts"] == "0"
    assert job.ended("COMPLETED")["Restarts"] == "1"
    assert "\nrequeue  exit code 143 after step_0" in job.said() and "(0 of 3 times without a newer checkpoint)\n" in job.said()
    assert_nothing_is_lost(job, whole, segments=2)


def test_a_job_that_an_operator_requeues_loses_nothing(slurm: Slurm, prepared: Place, whole: Ended, tmp_path: Path) -> None:
    """Slurm ends the script itself, and starts it again."""
    job = Job(slurm, prepared, tmp_path)
    until(lambda: job.reached(25), job.said)
    slurm.command("scontrol", "requeue", job.number)
    assert job.ended("COMPLETED")["Restarts"] == "1"
    assert "\nrequeue  " not in job.said()
    assert_nothing_is_lost(job, whole, segments=2)


def test_a_job_that_comes_to_its_time_limit_goes_on(slurm: Slurm, prepared: Place, whole: Ended, tmp_path: Path) -> None:
    """SIGUSR1 comes before the limit: a checkpoint, exit code 138, a requeue.

    Slurm's shortest limit is a minute, and it looks twice a minute: the signal comes 5 to 35 seconds after the start. What is done after
    each step makes the run longer than that, and changes no loss. Its second start gets more time.
    """
    slow = {"schedule__validate_every": 1, "sample__every": 1, "evaluate__every": 1, "evaluate__tasks": "validation"}
    job = Job(slurm, prepared, tmp_path, "--time", "1", "--grace", "55", **slow)
    until(lambda: "\nrequeue  exit code 138 after " in job.said(), job.said)
    slurm.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    assert job.ended("COMPLETED")["Restarts"] == "1"
    assert "DUE TO TIME LIMIT" not in job.said()
    assert_nothing_is_lost(job, whole, segments=1 + job.said().count("\nrequeue  exit code 138 after step_"))


def test_a_cancelled_job_saves_and_stays_away(slurm: Slurm, prepared: Place, whole: Ended, tmp_path: Path) -> None:
    job = Job(slurm, prepared, tmp_path)
    until(lambda: job.reached(5), job.said)
    slurm.command("scancel", job.number)
    assert job.ended("CANCELLED")["Restarts"] == "0"
    until(lambda: json.loads(job.folder.run.read_text())["status"] == "interrupted", job.said)
    until(lambda: job.number not in slurm.jobs(), job.said)
    assert job.state["JobState"] == "CANCELLED" and "\nrequeue  " not in job.said()
    assert step_of(latest(job.folder.checkpoints)) >= 5


def test_a_mistake_is_not_requeued(slurm: Slurm, prepared: Place, tmp_path: Path) -> None:
    """The text was there when the script was printed."""
    text = tmp_path / "train.txt"
    text.write_text(prepared.train.read_text())
    job = Job(slurm, prepared, tmp_path, data__train=text, submit=("--hold",))
    text.unlink()
    slurm.command("scontrol", "release", job.number)
    state = job.ended("FAILED")
    assert (state["ExitCode"], state["Restarts"]) == ("2:0", "0")
    assert f"error  data.train = '{text}'" in job.said()


def test_a_job_that_only_crashes_is_requeued_a_few_times(slurm: Slurm, prepared: Place, tmp_path: Path) -> None:
    """The virtual environment of the nodes is broken."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "bin/python").chmod(0o755)
    job = Job(slurm, prepared, tmp_path, "--requeues", "2", "--activate", f"export PATH={tmp_path}/bin:$PATH")
    state = job.ended("FAILED")
    assert (state["ExitCode"], state["Restarts"]) == ("1:0", "2")
    counts = [line.rpartition("(")[2][0] for line in job.said().splitlines() if line.startswith("requeue  exit code 1 after no-checkpoint")]
    assert counts == ["1", "2"]
    assert "error  exit code 1 after no-checkpoint: 2 requeues have brought no newer checkpoint, so the job ends\n" in job.said()
