"""A rank ends with its launcher, whichever of the launcher's processes was killed and when; what a shell started lives on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from research import ROOT
from tests.parallel.test_process_identity import IN_A_NAMESPACE, can_unshare
from tests.research.helpers import hosts
from tests.research.helpers.launches import Place

LIMIT = 60.0
STARTS = """
import os, pathlib, subprocess, sys, time
pathlib.Path({pid!r}).write_text(str(os.getpid()))
{wait}
subprocess.Popen({command!r}, start_new_session={leads}).wait()
"""
RANK = """
import os, pathlib, sys, time
sys.path.insert(0, {root!r})
from research.reliability.parents import follow
here = pathlib.Path({here!r})
(here / "rank.pid").write_text(str(os.getpid()))
parents = follow({launcher!r})
(here / "followed").write_text(str(len(parents.above)))
time.sleep(1000)
"""


class Chain:
    """command → launch.py → rank, as files with a launcher's names, in a session of their own; `leader` begins another session."""

    def __init__(self, here: Path, launcher: str, names: list[str], wait: str = "", leader: str = "") -> None:
        self.here = here
        (here / "rank.py").write_text(RANK.format(root=str(ROOT), here=str(here), launcher=launcher))
        command, self.names = [sys.executable, str(here / "rank.py")], [*names, "rank"]
        for level, name in reversed([*enumerate(names)]):
            held = wait if level == len(names) - 1 else ""
            leads = [*names, "rank"][level + 1] == leader
            (here / name).write_text(STARTS.format(pid=str(here / f"{name}.pid"), wait=held, command=command, leads=leads))
            command = [sys.executable, str(here / name)]
        self.process = subprocess.Popen(command, start_new_session=True)

    def pid(self, name: str) -> int:
        path = self.here / f"{name}.pid"
        until(lambda: path.exists() and path.read_text() != "")
        return int(path.read_text())

    def followed(self) -> int:
        path = self.here / "followed"
        until(lambda: path.exists() and path.read_text() != "")
        return int(path.read_text())

    def kill(self) -> None:
        for name in self.names:
            if (self.here / f"{name}.pid").exists():
                end(self.pid(name))
        self.process.kill()
        self.process.wait()


def end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Callable[..., Chain]]:
    begun = []

    def begin(*arguments: str, **more: str) -> Chain:
        place = tmp_path / str(len(begun))
        place.mkdir()
        begun.append(Chain(place, *arguments, **more))
        return begun[-1]

    yield begin
    for each in begun:
        each.kill()


DEEPSPEED = ["deepspeed", "deepspeed.launcher.launch"]


@pytest.mark.parametrize(
    ("launcher", "names", "victim"),
    [("deepspeed", DEEPSPEED, "deepspeed"), ("deepspeed", DEEPSPEED, "deepspeed.launcher.launch"), ("torchrun", ["torchrun"], "torchrun")],
)
def test_a_rank_ends_when_a_process_of_its_launcher_is_killed(launcher, names, victim, chain) -> None:
    begun = chain(launcher, names)
    assert begun.followed() == len(names)
    end(begun.pid(victim))
    until(lambda: gone(begun.pid("rank")))


@pytest.mark.parametrize(
    "names", [["sshd-session", "deepspeed.launcher.launch"], ["any", "shell of deepspeed.launcher.launch", DEEPSPEED[1]]]
)
def test_on_another_host_the_remote_shells_server_is_followed_whatever_its_name(names, chain) -> None:
    """It starts launch.py, or the shell around launch.py, in a session of its own."""
    begun = chain("deepspeed", names, leader=names[1])
    assert begun.followed() == len(names)
    end(begun.pid(names[0]))
    until(lambda: gone(begun.pid("rank")))


@pytest.mark.slow
def test_a_shell_that_started_launch_py_in_its_own_session_may_end(chain) -> None:
    """As in a terminal, and as the `deepspeed` command that leads a session under cron or systemd."""
    chains = [chain("deepspeed", ["a_shell", DEEPSPEED[1]]), chain("deepspeed", ["cron", *DEEPSPEED], leader="deepspeed")]
    for begun, followed in zip(chains, (1, 2), strict=True):
        assert begun.followed() == followed
        end(begun.process.pid)
        begun.process.wait()
        top = begun.pid(begun.names[1])
        until(lambda begun=begun, top=top: psutil.Process(top).ppid() != begun.process.pid)
    time.sleep(2.0)  # the thread checks once per second
    assert not [begun.names for begun in chains if gone(begun.pid("rank"))]


def test_a_command_that_was_killed_before_its_ranks_began_is_missed_all_the_same(chain, tmp_path) -> None:
    begun = chain("deepspeed", DEEPSPEED, wait=f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.05)\n")
    begun.pid("deepspeed.launcher.launch")
    end(begun.pid("deepspeed"))
    begun.process.wait()
    (tmp_path / "go").touch()
    until(lambda: gone(begun.pid("rank")))


def test_what_no_such_launcher_has_started_outlives_its_parent(chain) -> None:
    cases = [("python", ["deepspeed"]), ("srun", ["slurmstepd"]), ("deepspeed", ["my_shell"])]
    chains = [chain(launcher, names) for launcher, names in cases]
    for begun, (_, names) in zip(chains, cases, strict=True):
        assert begun.followed() == 0, names
        end(begun.pid(names[0]))
        begun.process.wait()
        until(lambda begun=begun: psutil.Process(begun.pid("rank")).ppid() != begun.process.pid)
    time.sleep(2.0)  # the thread checks once per second, if there is one
    assert not [names for begun, (_, names) in zip(chains, cases, strict=True) if gone(begun.pid("rank"))]


@pytest.mark.skipif(not can_unshare(), reason="a pid namespace may not be made here")
def test_a_launcher_that_is_process_1_of_its_container_is_not_taken_for_init() -> None:
    """It starts its ranks in sessions of their own, as torchrun does, under a name that we do not know."""
    rank = "from research.reliability.parents import Parents; import os; print(os.getppid(), Parents('torchrun').gone)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}], start_new_session=True)"
    done = subprocess.run([*IN_A_NAMESPACE, sys.executable, "-c", launcher], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout == "1 False\n", done.stderr


@pytest.mark.slow
@pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not()))
@pytest.mark.parametrize("before", ["", "export A=1; cd /; "], ids=["exec", "a list"])
def test_ranks_on_other_hosts_end_when_pdsh_and_ssh_are_killed(before: str, tmp_path: Path) -> None:
    """launch.py and the rank are files with their names; pdsh, ssh, sshd and the hosts are real."""
    place = Place(tmp_path / "place")
    with hosts.Cluster(place) as cluster:
        work = place.path / "work"
        work.mkdir()
        work.chmod(0o777)  # on a host, another user writes here
        rank = RANK.format(root=str(ROOT), here=str(work), launcher="deepspeed").replace(
            "here / ", "here / __import__('socket').gethostname() / "
        )
        for name in cluster.names:
            (work / name).mkdir()
            (work / name).chmod(0o777)
        (place.path / "rank.py").write_text(rank)
        launcher = place.path / DEEPSPEED[1]
        launcher.write_text(f"import subprocess, sys\nsubprocess.Popen([sys.executable, {str(place.path / 'rank.py')!r}]).wait()\n")
        command = f"{before}{sys.executable} -u {launcher} --node_rank=%n"
        begun = cluster[0].popen(["pdsh", "-R", "ssh", "-w", ",".join(cluster.names), command], Path("/"))
        for name in cluster.names:
            until(lambda name=name: (work / name / "followed").exists() and (work / name / "followed").read_text() == "2")
        for process in cluster[0].processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() in ("pdsh", "ssh"):
                    process.kill()
        begun.wait(LIMIT)
        cluster.wait_until_idle(LIMIT)
