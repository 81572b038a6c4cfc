"""`supervise` over launches that do as they are told: what is launched again, with which settings, until when, and what is left of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from parallel.errors import Mistake
from research import ROOT
from research.cli.supervise import WHAT, _divided, main
from research.cluster import exit_codes
from research.config import serialization
from research.config.experiment_folder import load
from research.reliability.parents import LAUNCHER_GONE
from research.reliability.supervisor import Outcome, outcome_of, pause_before

LIMIT = 120.0
STUB = """
import json, os, signal, sys, time
from pathlib import Path

here = Path(__file__).parent
calls = here / "calls.jsonl"
number = len(calls.read_text().splitlines()) if calls.exists() else 0
plan = json.loads((here / "plan.json").read_text())
does = plan[min(number, len(plan) - 1)]
with calls.open("a") as file:
    file.write(json.dumps({"argv": sys.argv[1:], "pid": os.getpid()}) + "\\n")
print(f"launch {number}", flush=True)

def run_json(run, status, reason=""):
    value = {"status": status, "reason": reason, "pid": os.getpid(), "launch": number}
    (run / "run.json").write_text(json.dumps(value))

if "run" in does:
    run = Path(does["runs"]) / here.name / does["run"]
    step = run / "checkpoints" / f"step_{does.get('step', 0):06d}"
    step.mkdir(parents=True, exist_ok=True)
    run_json(run, "running")
    if "step" in does:
        (step / "manifest.json").write_text(json.dumps({"step": does["step"]}))
        (step.parent / "latest").write_text(step.name)
    if "sleep" in does:
        def stop(number, frame):
            run_json(run, "interrupted", signal.Signals(number).name)
            sys.exit(128 + number)
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(each, stop)
        time.sleep(does["sleep"])
    run_json(run, does.get("status", "failed"), does.get("reason", "it was planned"))
    if "other" in does:
        other = run.parent / does["other"]
        other.mkdir()
        (other / "config.json").write_text((here / "seed_7.json").read_text())
        run_json(other, "finished")
if does.get("kill"):
    os.kill(os.getpid(), does["kill"])
sys.exit(does.get("code", 1))
"""


class Stub:
    """An experiment whose launches follow a plan."""

    def __init__(self, path: Path) -> None:
        self.folder, self.runs = path / "stub", path / "runs"
        self.folder.mkdir()
        shutil.copy(ROOT / "experiments/gpt_sotu/config.py", self.folder)
        (self.folder / "launch.py").write_text(STUB)
        serialization.save(load(self.folder).experiment.model_copy(update={"seed": 7}), self.folder / "seed_7.json")
        self.resumed = ["--resume", str(self.runs / "stub/a")]

    def start(self, *plan: dict[str, Any], options: tuple[str, ...] = (), settings: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """`supervise` under way. The last entry of the plan is for all launches that follow."""
        (self.folder / "plan.json").write_text(json.dumps([{"runs": str(self.runs), **entry} for entry in plan]))
        ours = [str(self.folder), "--launcher", "python", *options]
        command = [sys.executable, "-m", "research", "supervise", *ours, "--", "--track.runs", str(self.runs), *settings]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def run(self, *plan: dict[str, Any], **more: Any) -> subprocess.CompletedProcess[str]:
        """`supervise` to its end."""
        process = self.start(*plan, **more)
        out, err = process.communicate(timeout=LIMIT)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @property
    def calls(self) -> list[dict[str, Any]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def arguments(self) -> list[list[str]]:
        """What each launch was given after the settings that are always there."""
        assert all(call["argv"][:2] == ["--track.runs", str(self.runs)] for call in self.calls)
        return [call["argv"][2:] for call in self.calls]


@pytest.fixture
def stub(tmp_path: Path) -> Stub:
    return Stub(tmp_path)


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


FINISHED = {"run": "a", "step": 9, "status": "finished", "code": 0}


def test_a_crash_is_launched_again_from_its_checkpoint(stub: Stub) -> None:
    """The second launch brings no newer checkpoint, the third one does, so the fourth is the first restart again."""
    at_3 = {"run": "a", "step": 3}
    done = stub.run(at_3, at_3, {"run": "a", "step": 6}, FINISHED, options=("--restarts", "2"), settings=("--seed", "5"))
    assert done.returncode == 0
    assert stub.arguments == [["--seed", "5"], *[["--seed", "5", *stub.resumed]] * 3]
    assert done.stdout == "".join(f"launch {number}\n" for number in range(4))
    said = [line for line in done.stderr.splitlines() if line.startswith("supervise  ")]
    assert [line.split(" (restart ")[1][0] for line in said] == ["1", "2", "1"]
    assert "exit code 1 after a checkpoint at step 3, stub-a (it was planned) → launched again in 1 s" in said[0]


@pytest.mark.slow
def test_it_gives_up_where_no_checkpoint_is_newer(stub: Stub) -> None:
    done = stub.run({"run": "a", "step": 3, "code": 7}, options=("--restarts", "2"))
    assert done.returncode == 7
    assert stub.arguments == [[], stub.resumed, stub.resumed]
    assert "supervise  gives up: exit code 7 after a checkpoint at step 3" in done.stderr.splitlines()[-1]
    assert "2 restarts have brought no newer checkpoint" in done.stderr


@pytest.mark.slow
def test_without_a_checkpoint_there_is_nothing_to_resume(stub: Stub) -> None:
    """An older run of the same experiment must not be taken for this one."""
    old = stub.runs / "stub/old/checkpoints"
    (old / "step_000005").mkdir(parents=True)
    (old / "latest").write_text("step_000005")
    (old / "step_000005/manifest.json").write_text('{"step": 5}')
    (old.parent / "run.json").write_text('{"status": "interrupted"}')
    done = stub.run({}, {"run": "a"}, options=("--restarts", "2"))
    assert done.returncode == 1
    assert stub.arguments == [[], [], []]
    assert "exit code 1 before any checkpoint → launched again" in done.stderr


def test_a_run_with_another_seed_is_not_this_launchs(stub: Stub) -> None:
    """Somebody else trains the experiment with seed 7 meanwhile, and finishes first. It would be taken for ours, and nothing relaunched."""
    done = stub.run({"run": "a", "step": 3, "other": "b"}, FINISHED)
    assert done.returncode == 0
    assert stub.arguments == [[], stub.resumed]


@pytest.mark.parametrize(
    ("does", "code"),
    [
        ({"code": 2}, 2),
        ({"run": "a", "code": 3}, 3),
        ({"run": "a", "code": 6}, 6),
        ({"kill": 15}, 143),
        ({"run": "a", "status": "interrupted", "reason": "SIGTERM"}, 1),
    ],
)
def test_what_would_only_happen_again_and_what_was_asked_to_stop_is_not_launched_again(does: dict, code: int, stub: Stub) -> None:
    done = stub.run(does)
    assert (done.returncode, done.stderr, len(stub.calls)) == (code, "", 1)


def test_a_launcher_that_was_killed_is_a_crash_whatever_it_returns(stub: Stub) -> None:
    """DeepSpeed gives 0 when its launch.py was killed; the ranks have saved and say why they ended."""
    done = stub.run({"run": "a", "step": 3, "status": "interrupted", "reason": LAUNCHER_GONE, "code": 0}, FINISHED)
    assert done.returncode == 0 and stub.arguments == [[], stub.resumed]


@pytest.mark.parametrize("number", [*(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGTERM)), signal.SIGUSR1])
def test_a_signal_goes_on_to_the_launch_and_ends_it(number: int, stub: Stub) -> None:
    process = stub.start({"run": "a", "sleep": 1000})
    until(lambda: (stub.runs / "stub/a/run.json").exists())
    time.sleep(0.5)  # until the stub has its handlers
    os.kill(process.pid, number)
    assert process.wait(LIMIT) == 128 + number
    assert json.loads((stub.runs / "stub/a/run.json").read_text())["reason"] == signal.Signals(number).name
    assert len(stub.calls) == 1 and gone(stub.calls[0]["pid"])


def test_a_signal_while_it_waits_ends_it(stub: Stub) -> None:
    process = stub.start({})
    until(lambda: "launched again in 2 s" in process.stderr.readline())
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(LIMIT) == 143
    assert len(stub.calls) == 2


def test_a_supervisor_that_is_killed_takes_the_launch_along(stub: Stub) -> None:
    process = stub.start({"run": "a", "sleep": 1000})
    until(lambda: (stub.runs / "stub/a/run.json").exists())
    time.sleep(0.5)
    process.kill()
    process.wait()
    until(lambda: gone(stub.calls[0]["pid"]))
    assert json.loads((stub.runs / "stub/a/run.json").read_text())["reason"] == "SIGTERM"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["experiments/gpt_sotu", "--restarts", "-1"], "--restarts -1 is not a number of restarts → use 0 or more"),
        (
            ["experiments/gpt_sotu", "--launcher", "deepsped"],
            "--launcher 'deepsped': there is no program 'deepsped' → did you mean deepspeed?",
        ),
        (["experiments/none"], "experiments/none has no config.py"),
        (["experiments/gpt_sotu", "--", "--model.num_head", "3"], "model.num_head is not a setting → did you mean model.num_heads?"),
        (["experiments/gpt_sotu", "--seed", "3"], "python -m research supervise does not know --seed"),
    ],
)
def test_a_mistake_is_said_before_anything_is_launched(argv: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, "-m", "research", "supervise", *argv], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error  {said}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--help", "--version", "--dry-run", "--check-cluster"])
def test_a_launch_that_trains_nothing_is_not_supervised(option: str) -> None:
    with pytest.raises(Mistake, match="--check-cluster train nothing → launch with them directly, without supervise"):
        main(["python", "experiments/gpt_sotu/launch.py", option])


def test_its_help_names_every_exit_code_after_which_it_does_something_of_its_own() -> None:
    """The table of docs/running.md, without those that are a crash or a signal."""
    assert {int(code) for code in re.findall(r"\((?:exit code )?(\d)\)", WHAT)} == {
        *exit_codes.NOT_AGAIN,
        exit_codes.DISK,
        exit_codes.DAMAGED,
    }


@pytest.mark.parametrize(
    ("argv", "ours", "settings"),
    [
        ("experiments/x --restarts 2 -- --seed 3", "experiments/x --restarts 2", "--seed 3"),
        ("deepspeed --hostfile hosts experiments/x/launch.py --seed 3", "--launcher|deepspeed --hostfile hosts|experiments/x", "--seed 3"),
        ("--shrink --restarts 2 deepspeed -H h x/launch.py", "--shrink --restarts 2 --launcher|deepspeed -H h|x", ""),
        ("--restarts=2 launch.py --resume auto", "--restarts=2 .", "--resume auto"),
        ("experiments/x -- --data.train launch.py", "experiments/x", "--data.train launch.py"),
    ],
)
def test_a_launch_may_be_written_out(argv: str, ours: str, settings: str) -> None:
    """A | b stands for a value with spaces."""
    expected = [word for i, part in enumerate(ours.split("|")) for word in ([part] if i == 1 else part.split())]
    assert _divided(argv.split()) == (expected, settings.split())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--shrink experiments/gpt_sotu", "--shrink chooses among the hosts of `deepspeed --hostfile FILE`, and it needs a hostfile →"),
        ("--shrink torchrun experiments/gpt_sotu/launch.py", "and it needs a hostfile →"),
        ("--shrink deepspeed -H h --num_gpus 2 experiments/gpt_sotu/launch.py", "and --num_gpus does not go with it →"),
        ("--shrink deepspeed --hostfile=h --exclude=a experiments/gpt_sotu/launch.py", "and --exclude does not go with it →"),
        ("deepspeed --hostfile none experiments/gpt_sotu/launch.py", "there is no hostfile none →"),
    ],
)
def test_a_hostfile_that_cannot_be_supervised(argv: str, said: str) -> None:
    with pytest.raises(Mistake, match=re.escape(said)):
        main(argv.split())


def test_it_waits_twice_as_long_each_time_and_a_minute_at_most() -> None:
    assert [pause_before(restart) for restart in range(9)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]


OVER, STOPPED, CRASHED = Outcome.OVER, Outcome.STOPPED, Outcome.CRASHED
FULL, DAMAGED = Outcome.DISK_FULL, Outcome.DAMAGED


@pytest.mark.parametrize(
    ("code", "signalled", "status", "reason", "outcome"),
    [
        (0, 0, "finished", "", OVER),
        (1, 0, "finished", "", OVER),  # it has taken all its steps, whatever happened then
        (0, 15, "finished", "", OVER),
        (2, 0, "", "", OVER),
        (0, 0, "", "", CRASHED),  # DeepSpeed's 0 for a launch.py that was killed
        (0, 0, "running", "", CRASHED),
        (0, 0, "died", "", CRASHED),
        (1, 0, "failed", "ValueError", CRASHED),
        (124, 0, "failed", "no progress", CRASHED),
        (247, 0, "failed", "rank 1 …", CRASHED),
        (-9, 0, "interrupted", LAUNCHER_GONE, CRASHED),
        (0, 0, "interrupted", f"{LAUNCHER_GONE}, but …", CRASHED),
        (-15, 0, "interrupted", LAUNCHER_GONE, STOPPED),  # the `deepspeed` command was asked to stop
        (143, 0, "interrupted", "SIGTERM", STOPPED),
        (1, 0, "interrupted", "SIGTERM", STOPPED),  # torchrun's 1
        (246, 0, "", "", STOPPED),  # a rank that SIGUSR1 ended in its imports, as DeepSpeed tells it
        (1, 15, "", "", STOPPED),
        (4, 0, "failed", "no room", FULL),
        (5, 0, "", "", DAMAGED),
        (4, 15, "failed", "no room", STOPPED),
        (6, 0, "failed", "the folder was deleted", OVER),
    ],
)
def test_what_is_a_crash(code: int, signalled: int, status: str, reason: str, outcome: Outcome) -> None:
    assert outcome_of(code, signalled, status, reason) is outcome
