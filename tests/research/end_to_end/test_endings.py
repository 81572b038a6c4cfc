"""A process of a job is signalled, killed or stopped, at any moment: the whole job ends in time, with a checkpoint if there can be one.

Run with -s to see the seconds from the signal to the last process's end.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.reader import Reader
from parallel.files import read_json
from research.reliability.parents import LAUNCHER_GONE
from tests.research.end_to_end.test_stops import LONG, TRAINING, assert_kept, assert_mirrored, until
from tests.research.helpers.launches import ROOT, Ended, Launch, Place, _environment, _sentence

pytestmark = pytest.mark.slow
INT, TERM, USR1, HUP, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGKILL
SLACK = 3
"""On a busy machine, a job may take this many times the 30 and 15 seconds that it may take on an idle one."""


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A validation text that takes minutes to evaluate."""
    path = tmp_path_factory.mktemp("text") / "long.jsonl"
    path.write_text("".join(json.dumps({"text": _sentence(number, 500)}) + "\n" for number in range(3000)))
    return path


def heartbeats(launch: Launch) -> list[dict[str, Any]]:
    """The contents of the ranks' heartbeat files."""
    contents = []
    for path in launch.place.runs.glob("*/*/logs/rank_*.alive.json"):
        if path.parents[1] / "run.json" not in launch.before:
            contents.append(json.loads(path.read_text()))
    return contents


def evaluates(launch: Launch) -> bool:
    return any(heartbeat["doing"] == "validation" for heartbeat in heartbeats(launch))


def imports(launch: Launch) -> bool:
    """Whether the last rank is importing torch."""
    rank = launch.roles().get("rank 1")
    return rank is not None and "libtorch" in Path(f"/proc/{rank.pid}/maps").read_text()


def come_to(moment: str, launch: Launch) -> None:
    """Waits until the launch has reached this moment."""
    if moment == "import":
        until(lambda: imports(launch))
    elif moment == "evaluation":
        until(lambda: evaluates(launch))
    else:
        launch.wait_for({"start-up": "\nmodel ", "step": TRAINING}[moment])


def gone(launch: Launch, within: float) -> Ended:
    """Waits until no process of the launch is left, including orphans."""
    began = time.monotonic()
    while alive := launch.family():
        assert time.monotonic() - began < within * SLACK, alive
        time.sleep(0.1)
    ended = launch.wait()
    print(f"  gone in {time.monotonic() - began:.1f} s, code {ended.code}, {state(ended) if ended.run else 'no run'}", end="")
    return ended


def state(ended: Ended) -> tuple[str, str]:
    """The status and the reason in run.json."""
    run = read_json(ended.folder.run)
    return run["status"], run.get("reason", "")


def assert_saved(ended: Ended, moment: str) -> None:
    """There is a checkpoint. If the run stopped in an evaluation, it is of the step before, and the evaluation has no row."""
    if moment == "step":
        assert_kept(ended)
        return
    reader = Reader(checkpoint_folder.latest(ended.folder.checkpoints))
    reader.check()
    assert reader.manifest.facts["step"] == 1 and ended.rows("val/loss") == []


SIGNALS: list[tuple[str, str, str, int, int | None]] = [  # the last: the exit code, None where it is the launcher's own affair
    ("deepspeed", "import", "command", TERM, -TERM),
    ("deepspeed", "import", "launch.py", USR1, 0),
    ("deepspeed", "start-up", "command", KILL, -KILL),
    ("deepspeed", "start-up", "launch.py", TERM, 1),
    ("deepspeed", "step", "command", TERM, -TERM),
    ("deepspeed", "step", "command", INT, None),
    ("deepspeed", "step", "launch.py", KILL, 0),
    ("deepspeed", "step", "rank 1", USR1, 128 + USR1),
    ("deepspeed", "evaluation", "command", KILL, -KILL),
    ("deepspeed", "evaluation", "launch.py", TERM, 1),
    ("torchrun", "import", "rank 0", TERM, 1),
    ("torchrun", "step", "command", TERM, None),
    ("torchrun", "evaluation", "command", KILL, -KILL),
    ("python", "step", "rank 0", HUP, 128 + HUP),
    ("python", "evaluation", "rank 0", USR1, 128 + USR1),
]


@pytest.mark.parametrize(("launcher", "moment", "target", "number", "code"), SIGNALS)
def test_a_signal(launcher: str, moment: str, target: str, number: int, code: int | None, launched, long_text: Path) -> None:
    settings = LONG | ({"data__validation": long_text, "schedule__validate_every": 1} if moment == "evaluation" else {})
    mode = "offline" if (target, number) == ("launch.py", KILL) else "disabled"
    ranks = 1 if launcher == "python" else 2
    launch = launched(launcher, ranks, parallel__tensor=ranks, track__mode=mode, **settings)
    come_to(moment, launch)
    os.kill(launch.roles()[target].pid, number)
    ended = gone(launch, 30.0)
    assert code is None or ended.code == code
    if moment == "import":
        assert ended.run is None
        return
    status, reason = state(ended)
    orphaned = target != "rank 1" and number == KILL or (launcher, target) == ("deepspeed", "command")
    assert (status, reason) == (
        "interrupted",
        LAUNCHER_GONE if orphaned else signal.Signals(number if target != "launch.py" else TERM).name,
    )
    if moment == "start-up":
        assert not (ended.folder.checkpoints / "latest").exists()
    else:
        assert_saved(ended, moment)
    if mode == "offline":
        assert_mirrored(ended)


def test_the_command_is_killed_before_there_are_ranks(launched) -> None:
    launch = launched("deepspeed", 2, parallel__tensor=2, **LONG)
    until(lambda: {"command", "launch.py"} <= launch.roles().keys())
    os.kill(launch.roles()["command"].pid, KILL)
    assert gone(launch, 30.0).run is None


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_signals_rain_on_the_ranks_while_they_save(launcher: str, launched) -> None:
    launch = launched(launcher, 2, parallel__tensor=2, **LONG)
    launch.wait_for(TRAINING)
    ranks = [process for role, process in launch.roles().items() if role.startswith("rank")]
    drops = 0
    while alive := [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]:
        for rank in alive:
            rank.send_signal((TERM, USR1, INT)[drops % 3])
        drops += 1
        time.sleep(0.01)
    ended = gone(launch, 30.0)
    assert drops > 10
    assert_kept(ended)
    assert "Traceback" not in ended.err.replace("torch/distributed", "") or launcher == "torchrun"


@pytest.mark.parametrize(
    ("launcher", "moment", "victim"), [("deepspeed", "step", 1), ("deepspeed", "start-up", 1), ("torchrun", "step", 0)]
)
def test_a_rank_is_killed(launcher: str, moment: str, victim: int, launched) -> None:
    launch = launched(launcher, 2, parallel__tensor=2, **LONG)
    come_to(moment, launch)
    rank = launch.roles()[f"rank {victim}"]
    rank.kill()
    ended = gone(launch, 15.0)
    assert ended.code not in (0, None)
    status, reason = state(ended)
    assert status == "failed" and reason.startswith(f"rank {victim} (process {rank.pid} on ") and "gone without a word" in reason
    assert f"error  {reason}" in ended.err
    assert "/research/training/" not in ended.err, "a traceback of ours"


@pytest.mark.parametrize(("launcher", "victim"), [("deepspeed", 1), ("torchrun", 0)])
def test_a_rank_is_stopped(launcher: str, victim: int, launched) -> None:
    launch = launched(launcher, 2, parallel__tensor=2, watch__hang_seconds=10, **LONG)
    launch.wait_for(TRAINING)
    rank = launch.roles()[f"rank {victim}"]
    rank.suspend()
    ended = gone(launch, 10.0 + 5.0)
    assert ended.code != 0
    status, reason = state(ended)
    assert status == "failed" and reason.startswith("no progress for 1") and f": rank {victim} (process {rank.pid} on " in reason
    assert "gave its last sign of life at " in reason and f"error  {reason}" in ended.err
    assert f"rank {victim}, as it last said:" in ended.folder.rank_log(1 - victim).read_text()
    assert "all_reduce" in ended.folder.rank_log(1 - victim).read_text(), "the survivor's own stack"


def test_a_rank_that_was_asked_to_end_does_not_wait_for_a_stopped_one(launched) -> None:
    launch = launched("deepspeed", 2, parallel__tensor=2, **LONG)
    launch.wait_for(TRAINING)
    roles = launch.roles()
    roles["rank 1"].suspend()
    os.kill(roles["launch.py"].pid, TERM)
    ended = gone(launch, 30.0)
    status, reason = state(ended)
    assert status == "interrupted" and reason.startswith("SIGTERM, but no progress for ") and "rank 1 (process " in reason


def test_a_run_whose_reader_has_left_goes_on_to_its_end(place: Place) -> None:
    """As in `launch.py | head -1`, and in `launch.py | tee log` after a Ctrl-C."""
    command = [sys.executable, "experiments/gpt_sotu/launch.py", *place.settings({})]
    with subprocess.Popen(command, cwd=ROOT, env=_environment(place), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == "starting gpt_sotu on 1 rank …\n".encode()
        assert process.stdout.readline().startswith(b"gpt_sotu")
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0
    assert read_json(place.runs / "gpt_sotu/latest/run.json")["status"] == "finished"
