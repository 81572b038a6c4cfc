"""Which run a launch made or resumed, and the settings of the next launch; no process of a launch that is over is left."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from parallel.checkpoint.folder import latest
from parallel.files import write_json
from research import ROOT
from research.reliability.supervisor import LaunchRecord, saved_step
from research.tracking import run_folder
from research.tracking.acquire_lock import is_held
from research.tracking.run_folder import RunFolder
from tests.parallel.helpers.checkpoints import save as save_whole


def script(launch: str, then: str, first: str = "") -> subprocess.CompletedProcess[str]:
    """A process that does `first`, launches `launch` and then does `then`."""
    head = "import sys\nfrom research.reliability import supervisor\nsupervisor.GRACE_SECONDS = 2.0\nlauncher = supervisor.Launcher()\n"
    code = f"{head}{first}code = launcher.run({launch})\n{then}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


IGNORES = "import os, signal, time; signal.signal(15, signal.SIG_IGN); os.write(1, b'%d\\n' % os.getpid()); time.sleep(1000)"
SCATTERED = f"""
import subprocess, sys
ignores = {IGNORES!r}
starts = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]])"
subprocess.Popen([sys.executable, "-c", ignores])
subprocess.Popen([sys.executable, "-c", ignores], start_new_session=True)
subprocess.run([sys.executable, "-c", starts, ignores], start_new_session=True)  # an orphan in a session of its own
import time; time.sleep(0.5)
sys.exit(7)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux only")
def test_what_a_launch_leaves_behind_is_killed() -> None:
    done = script(f"[sys.executable, '-c', {SCATTERED!r}]", "import psutil; print(code, len(psutil.Process().children(recursive=True)))")
    *pids, said = done.stdout.splitlines()
    assert said == "7 0" and len(pids) == 3, done
    assert not any(psutil.pid_exists(int(pid)) for pid in pids)


def test_what_ends_by_itself_in_time_is_let_end(tmp_path: Path) -> None:
    """Ranks whose launcher is gone are saving."""
    saves = f"import time; time.sleep(0.5); open({str(tmp_path / 'saved')!r}, 'w').close()"
    launch = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {saves!r}])"
    done = script(f"[sys.executable, '-c', {launch!r}]", "print(code)").stdout
    assert done == "0\n" and (tmp_path / "saved").exists()


SAVES = """
import os, signal, sys, time
signal.signal(15, lambda *_: (open(sys.argv[1], "w").close(), sys.exit()))
launcher = os.getppid()
print("ready", flush=True)
while os.getppid() == launcher:
    time.sleep(0.01)
time.sleep(0.2)  # until its exit code is read
os.kill(os.getppid(), 15)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux only")
def test_a_signal_after_the_launchers_end_reaches_the_ranks_it_has_left(tmp_path: Path) -> None:
    """The launcher's number may be another process's by then, so nothing is sent to its group."""
    leaves = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]], stdout=subprocess.PIPE).stdout.readline()"
    command = f"[sys.executable, '-c', {leaves!r}, '-c', {SAVES!r}, {str(tmp_path / 'told')!r}]"
    done = script(command, "print(code, launcher.signal)", first="supervisor.os.killpg = None\n")
    assert done.stdout == "0 15\n" and (tmp_path / "told").exists(), done.stderr


@pytest.mark.parametrize(("number", "code"), [(9, -9), (15, -15)])
def test_the_exit_code_tells_of_a_signal(number: int, code: int) -> None:
    assert script(f"[sys.executable, '-c', 'import os; os.kill(os.getpid(), {number})']", "print(code)").stdout == f"{code}\n"


def run(runs: Path, name: str = "gpt") -> RunFolder:
    folder = run_folder.create(runs, name)
    run_folder.start(folder, layout="", precision="", steps=9)
    return folder


def save(folder: RunFolder, step: int) -> None:
    checkpoint = folder.checkpoints / f"step_{step:06d}"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text(json.dumps({"step": step}))
    (folder.checkpoints / "latest").write_text(checkpoint.name)


def record_of(runs: Path, *strangers: RunFolder) -> LaunchRecord:
    return LaunchRecord(runs, lambda folder: folder not in strangers)


def test_a_launch_that_made_nothing_has_no_run(tmp_path: Path) -> None:
    save(run(tmp_path), 5)
    record = record_of(tmp_path / "gpt")
    record.begin()
    assert not record.end() and record.run is None and record.state() == ("", "")
    assert record.settings(["--seed", "3"]) == ["--seed", "3"]
    nowhere = record_of(tmp_path / "none")
    nowhere.begin()
    assert not nowhere.end()


def test_a_run_that_another_launch_removes_meanwhile_is_no_error(tmp_path: Path) -> None:
    """It is removed after its run.json was read, while the runs are compared."""
    gone = run(tmp_path)

    def is_ours(folder: RunFolder) -> bool:
        folder.run.unlink()
        return True

    record = LaunchRecord(tmp_path / "gpt", is_ours)
    record.begin()
    run_folder.end(gone, run_folder.FAILED, "crash")
    assert not record.end() and record.run == gone and record.state() == ("", "")


def test_only_a_newer_checkpoint_than_before_is_progress(tmp_path: Path) -> None:
    record, folder = record_of(tmp_path / "gpt"), run(tmp_path)
    save(folder, 5)
    found = []
    for step in (None, 7, None, 9):
        record.begin()
        run_folder.end(folder, run_folder.FAILED, f"crash before {step}")
        if step:
            save(folder, step)
        found.append((record.end(), record.last))
        assert record.run == folder and record.state() == ("failed", f"crash before {step}")
    assert found == [(False, 5), (True, 7), (False, 7), (True, 9)]


def test_runs_that_begin_anew_and_get_no_further_are_no_progress(tmp_path: Path) -> None:
    record, found = record_of(tmp_path / "gpt"), []
    for step in (3, 3, 4):
        record.begin()
        save(run(tmp_path), step)
        found.append(record.end())
    assert found == [True, False, True]


@pytest.mark.parametrize("given", [["--resume", "never", "--seed", "3"], ["--resume=runs/x", "--seed", "3"], ["--seed", "3"]])
def test_the_next_launch_goes_on_from_the_checkpoint(given: list[str], tmp_path: Path) -> None:
    record = record_of(tmp_path / "gpt")
    record.begin()
    mine = run(tmp_path)
    record.end()
    assert record.settings(given) == given
    save(mine, 2)
    record.end()
    assert record.settings(given) == ["--seed", "3", "--resume", str(mine.path)]


def test_a_run_with_other_settings_is_not_this_launchs(tmp_path: Path) -> None:
    """Two seeds of an experiment side by side: the other one is newer, and finished."""
    mine, other = run(tmp_path), run(tmp_path)
    record = record_of(tmp_path / "gpt", other)
    record.begin()
    run_folder.end(mine, run_folder.FAILED, "crash")
    save(mine, 2)
    run_folder.end(other, run_folder.FINISHED)
    save(other, 9)
    assert record.end() and (record.run, record.last, record.state()) == (mine, 2, ("failed", "crash"))


@pytest.mark.parametrize("text", ["", "{}", '{"step": null}', "nonsense"])
def test_a_damaged_checkpoint_is_none(text: str, tmp_path: Path) -> None:
    folder = run(tmp_path)
    assert saved_step(folder) == -1
    save(folder, 2)
    assert saved_step(folder) == 2
    (folder.checkpoints / "step_000002/manifest.json").write_text(text)
    assert saved_step(folder) == -1


PLANNED = """
import json, sys
from pathlib import Path
place = Path(sys.argv[1])
with (place / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[2:]) + "\\n")
number = len((place / "calls").read_text().splitlines())
run = place / "runs/gpt/aaaaaa"
code = {plan}[number - 1]
end = {{"status": "failed" if code else "finished", "launch": number, "code": code, "reason": "planned"}}
(run / "run.json").write_text(json.dumps(end))
sys.exit(1)
"""


def supervised(tmp_path: Path, plan: list[int], restarts: int = 1) -> tuple[int, list[list[str]], str]:
    """(exit code, the settings of each launch, what was said) of a run that rank 0 ends with these codes; its launcher returns 1."""
    (tmp_path / "planned.py").write_text(PLANNED.format(plan=plan))
    command = [sys.executable, str(tmp_path / "planned.py"), str(tmp_path)]
    code = f"""
import sys
from pathlib import Path
from research.reliability import supervisor
supervisor.FIRST_PAUSE, supervisor.DISK_PAUSES = 0.01, (0.02, 0.05)
record = supervisor.LaunchRecord(Path({str(tmp_path / "runs/gpt")!r}), lambda folder: True)
sys.exit(supervisor.supervise({command!r}, [], record, {restarts}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.returncode, [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()], done.stderr


def run_with_checkpoints(tmp_path: Path, steps: int) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "gpt" / "aaaaaa")
    folder.checkpoints.mkdir(parents=True)
    for step in range(1, steps + 1):
        save_whole(folder.checkpoints / f"step_{step:06d}", step=step)
    write_json(folder.run, {"status": "failed"})
    return folder


def test_a_full_disk_is_waited_for_and_is_no_restart(tmp_path: Path) -> None:
    folder = run_with_checkpoints(tmp_path, 1)
    code, calls, said = supervised(tmp_path, [4, 4, 4, 4, 0])
    assert code == 1 and calls == [[], *[["--resume", str(folder.path)]] * 4]
    assert said.count("the disk is full: make room; this does not count as a restart") == 4 and "(planned)" in said


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_resumed(tmp_path: Path) -> None:
    """By its hash: sizes and manifest are right."""
    folder = run_with_checkpoints(tmp_path, 3)
    file = sorted((folder.checkpoints / "step_000003").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    code, calls, said = supervised(tmp_path, [5, 0])
    assert code == 1 and calls == [[], ["--resume", str(folder.path)]]
    assert f"{file.name} has the SHA-256 " in said and "set aside, goes on from step_000002 → launched again" in said
    assert latest(folder.checkpoints).name == "step_000002" and not is_held(folder.lock)


def test_damage_that_is_not_there_is_not_tried_again(tmp_path: Path) -> None:
    """The checkpoint was named on the command line, and is another run's."""
    run_with_checkpoints(tmp_path, 2)
    assert supervised(tmp_path, [5, 0])[1] == [[]]


def test_a_launch_that_came_nowhere_does_not_make_the_next_one_begin_anew(tmp_path: Path) -> None:
    record = record_of(tmp_path / "gpt")
    record.begin()
    mine = run(tmp_path)
    save(mine, 2)
    record.end()
    record.begin()
    assert not record.end() and record.run is None and record.settings([]) == ["--resume", str(mine.path)]
