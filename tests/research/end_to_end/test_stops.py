"""Ctrl-C at every moment of a run: the run ends with a checkpoint or at once, leaves no process, and shows no traceback of ours."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.folder import latest
from parallel.checkpoint.reader import Reader
from research.tracking import metrics
from research.tracking.wandb_record import PICTURE
from tests.research.helpers import small_runs
from tests.research.helpers.launches import LIMIT, Ended, Launch, free_port, slurm
from tests.research.tracking.test_tracker import logged

LONG = {"schedule__steps": 100_000, "schedule__validate_every": 0, "schedule__log_every": 1}
TRAINING = "\n    2 "
"""The beginning of the terminal's line of the second step."""


def stopped(launch: Launch, gone_within: float = 40.0) -> Ended:
    """Sends Ctrl-C, waits for the end, and proves that no process is left. The command itself may end before its ranks do."""
    family = launch.family()
    launch.interrupt()
    for process in launch.processes:
        process.wait(gone_within)
    deadline = time.monotonic() + gone_within
    while alive := [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)
    return launch.wait()


def assert_kept(ended: Ended) -> None:
    """There is a whole checkpoint of the step after which the run stopped, and its record is closed."""
    assert ended.status == "interrupted"
    steps = ended.column("progress/step")
    with Reader(latest(ended.folder.checkpoints)) as reader:
        reader.check()
    assert reader.facts["step"] == checkpoint_folder.step_of(reader.folder) >= steps[-1] >= 2
    assert ended.folder.loss_png.is_file()
    assert f"\nended  after {reader.facts['step']} of 100000 steps" in ended.out
    assert "\nsaved " in ended.out and "\nnext " in ended.out


def interrupted_in_step_2(rank: int) -> None:
    """Every rank gets SIGINT before step 2, as from a terminal."""
    small_runs.before_step(rank, 2, lambda monitor: os.kill(os.getpid(), signal.SIGINT))


def test_ctrl_c_while_two_ranks_train(tmp_path) -> None:
    """On forked ranks; through launchers it is tested below."""
    ended = small_runs.Stage(tmp_path).run("interrupted", 2, prelude=interrupted_in_step_2, parallel={"tensor": 2})
    assert set(ended.codes) == {130}, ended.said
    assert json.loads(ended.folder.run.read_text())["status"] == "interrupted"
    with Reader(latest(ended.folder.checkpoints)) as reader:
        reader.check()
    assert reader.facts["step"] == checkpoint_folder.step_of(reader.folder) == max(ended.rows()) == 2
    assert ended.folder.loss_png.is_file()
    assert "\nended  after 2 of 12 steps" in ended.said
    assert "\nsaved " in ended.said and "\nnext " in ended.said
    assert "Traceback" not in ended.said and "error" not in ended.said


@pytest.mark.slow
def test_ctrl_c_while_python_trains(launched) -> None:
    launch = launched("python", **LONG)
    launch.wait_for(TRAINING)
    ended = stopped(launch)
    assert_kept(ended)
    assert (ended.code, ended.err) == (130, "")


@pytest.mark.slow
def test_ctrl_c_while_deepspeed_trains(launched) -> None:
    """All of its processes get the signal at once, and the ranks get SIGTERM from their launcher right after it."""
    launch = launched("deepspeed", 2, parallel__tensor=2, track__mode="offline", **LONG)
    launch.wait_for(TRAINING)
    ended = stopped(launch)
    assert_kept(ended)
    assert ended.code != 0
    assert_no_traceback_of_ours(ended)
    assert_mirrored(ended)


def assert_mirrored(ended: Ended) -> None:
    """There is one offline W&B run with every row of the run's files, although the launcher ended W&B's process together with the ranks."""
    (offline,) = ended.folder.wandb.glob("offline-run-*")
    rows, samples = list(metrics.read(ended.folder.metrics)), list(metrics.read(ended.folder.samples))
    *told, picture = logged(ended.folder)
    assert [row["progress/step"] for row in told] == [row["progress/step"] for row in [*rows, *samples]]
    assert picture[f"{PICTURE}.path"].endswith(".png")
    assert "\nwarn " not in ended.out


def assert_no_traceback_of_ours(ended: Ended) -> None:
    """The only traceback is that of DeepSpeed's runner, which shows where its own wait was interrupted."""
    for text in ended.err.split("Traceback (most recent call last):")[1:]:
        assert "deepspeed/launcher/runner.py" in text and text.rstrip().endswith("KeyboardInterrupt"), ended.err
    assert "Traceback" not in ended.out
    assert "/research/" not in ended.err


def test_ctrl_c_while_python_imports_torch(launched) -> None:
    """Before there is anything to save, the process ends at once, by the signal itself (a shell reports 130)."""
    launch = launched("python", **LONG)
    until(lambda: "libtorch" in Path(f"/proc/{launch.processes[0].pid}/maps").read_text())
    ended = stopped(launch, gone_within=10.0)
    assert (ended.code, ended.out, ended.err) == (-signal.SIGINT, "starting gpt_sotu on 1 rank …\n", "")


def test_ctrl_c_while_a_rank_waits_for_the_others(launched) -> None:
    """One task of two, whose other task never starts: it waits inside torch, where no Python code runs."""
    port = free_port()
    launch = launched("python", environ=slurm(0, 2, port), **LONG)
    until(lambda: listening(port))
    ended = stopped(launch, gone_within=10.0)
    assert (ended.code, ended.out, ended.err) == (-signal.SIGINT, "starting gpt_sotu on 2 ranks …\n", "")


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(happened: Callable[[], bool], limit: float = LIMIT) -> None:
    deadline = time.monotonic() + limit
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["gpt_sotu · run", "tokenizing", "tracking"])
def test_ctrl_c_between_the_header_and_the_first_step(moment: str, launched, tmp_path) -> None:
    launch = launched("python", data__cache=tmp_path, **LONG)
    launch.wait_for(moment)
    ended = stopped(launch)
    assert (ended.code, ended.err) == (130, "")
    assert ended.status == "interrupted"


@pytest.mark.slow
def test_ctrl_c_while_deepspeed_prepares(launched, tmp_path) -> None:
    launch = launched("deepspeed", 2, data__cache=tmp_path, parallel__tensor=2, **LONG)
    launch.wait_for("\nmodel ")
    ended = stopped(launch)
    assert ended.status == "interrupted"
    assert_no_traceback_of_ours(ended)


@pytest.mark.slow
def test_ctrl_c_while_torchrun_trains(launched) -> None:
    launch = launched("torchrun", 2, parallel__pipe=2, **LONG)
    launch.wait_for(TRAINING)
    ended = stopped(launch)
    assert_kept(ended)
