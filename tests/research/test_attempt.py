"""Of a launch that is over nothing is left, wherever it has hidden, and nothing else is touched."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(launch: str, then: str) -> subprocess.CompletedProcess[str]:
    """A process that launches `launch` and then does `then`."""
    head = "import sys\nfrom research import attempt\nattempt.GRACE_SECONDS = 2.0\nlaunches = attempt.Launches()\n"
    code = f"{head}code = launches.run({launch})\n{then}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


IGNORES = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(1000)"
SCATTERED = f"""
import subprocess, sys
ignores = {IGNORES!r}
starts = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]])"
subprocess.Popen([sys.executable, "-c", ignores])
subprocess.Popen([sys.executable, "-c", ignores], start_new_session=True)
subprocess.run([sys.executable, "-c", starts, ignores], start_new_session=True)  # an orphan in a session of its own
import time; time.sleep(2.0)
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


@pytest.mark.parametrize(("number", "code"), [(9, -9), (15, -15)])
def test_the_exit_code_tells_of_a_signal(number: int, code: int) -> None:
    assert script(f"[sys.executable, '-c', 'import os; os.kill(os.getpid(), {number})']", "print(code)").stdout == f"{code}\n"
