"""Which run a launch made or resumed, and the settings of the next launch; no process of a launch that is over is left."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from research import ROOT
from research.reliability.supervisor import LaunchRecord, saved_step
from research.tracking import run_folder
from research.tracking.run_folder import RunFolder


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
