"""A process is known by more than its number: neither one that has inherited the number nor one of another container is taken for it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from parallel import process_identity
from parallel.process_identity import ProcessIdentity

ROOT = Path(__file__).parent.parent.parent
SAYS_ITSELF = "import json; from dataclasses import asdict; from parallel.process_identity import ProcessIdentity as P; "
IN_A_NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc")
"""Runs a command as process 1 of a pid namespace of its own, as a container does."""


def can_unshare() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*IN_A_NAMESPACE, "true"], capture_output=True).returncode == 0


@pytest.fixture
def other() -> Iterator[ProcessIdentity]:
    """A process that sleeps."""
    process = subprocess.Popen(["sleep", "1000"])
    yield ProcessIdentity.of(psutil.Process(process.pid))
    process.kill()
    process.wait()


def test_a_process_is_alive_until_it_has_ended(other: ProcessIdentity) -> None:
    assert other.is_alive() is True and ProcessIdentity.current().is_alive() is True
    assert (found := other.find()) is not None and found.pid == other.pid
    os.kill(other.pid, signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert psutil.pid_exists(other.pid) and other.is_alive() is False and other.find() is None


def test_a_stranger_with_the_number_is_not_the_process(other: ProcessIdentity) -> None:
    earlier = replace(other, started_after_boot=other.started_after_boot - 60)
    assert earlier.is_alive() is False and earlier.find() is None


@pytest.mark.parametrize("change", [{"boot_id": "another"}, {"pid_namespace": "pid:[1]"}, {"boot_id": "", "host": "another"}])
def test_what_cannot_be_seen_is_not_known(change: dict, other: ProcessIdentity) -> None:
    elsewhere = replace(other, **change)
    assert elsewhere.is_alive() is None and elsewhere.find() is None


def test_another_name_of_the_host_is_the_same_machine(other: ProcessIdentity) -> None:
    """A laptop takes its name from the network that it is in."""
    assert replace(other, host="renamed").is_alive() is True


def test_setting_the_clock_changes_nothing(other: ProcessIdentity, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports boot and start in time of day, and both move when the clock is set. psutil reads them like this."""
    boot, create = psutil.boot_time, psutil.Process.create_time
    monkeypatch.setattr(psutil, "boot_time", lambda: boot() + 3600)
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: create(process) + 3600)
    assert other.is_alive() is True


def test_a_hidden_process_is_not_known(other: ProcessIdentity, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc mounted with hidepid=2 shows nothing of other users' processes, though they exist."""

    def hidden(pid: int) -> None:
        raise psutil.NoSuchProcess(pid)

    here = ProcessIdentity.current()
    monkeypatch.setattr(ProcessIdentity, "current", classmethod(lambda cls: here))
    monkeypatch.setattr(process_identity.psutil, "Process", hidden)
    assert other.is_alive() is None
    monkeypatch.setattr(process_identity.psutil, "pid_exists", lambda pid: False)
    assert other.is_alive() is False


def test_it_is_read_back_from_json_and_an_older_file_names_no_process(other: ProcessIdentity) -> None:
    saved = json.loads(json.dumps(asdict(other) | {"status": "running"}))
    assert ProcessIdentity.from_json(saved) == other
    assert ProcessIdentity.from_json({"host": other.host, "pid": other.pid}) is None
    assert ProcessIdentity.from_json(saved | {"started_after_boot": "?"}) is None
    for pid in (0, -1, 2**40, 1e400, "x"):  # a stranger's
        assert ProcessIdentity.from_json(saved | {"pid": pid}) is None


@pytest.mark.skipif(not can_unshare(), reason="a pid namespace may not be made here")
def test_every_container_has_a_process_1() -> None:
    """Each sees itself alone: the number is the same, the process is not."""
    code = SAYS_ITSELF + "me = P.current(); print(json.dumps({**asdict(me), 'alive': me.is_alive()}))"
    command = [*IN_A_NAMESPACE, sys.executable, "-c", code]
    first, second = (json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout) for _ in range(2))
    assert (first["pid"], second["pid"], first["alive"], second["alive"]) == (1, 1, True, True)
    one, other = ProcessIdentity.from_json(first), ProcessIdentity.from_json(second)
    assert one is not None and other is not None and one != other
    assert one.is_alive() is None  # from outside it is out of sight
    code = SAYS_ITSELF + f"print(P.from_json({first!r}).is_alive())"
    inside = subprocess.run([*IN_A_NAMESPACE, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert inside.stdout.strip() in ("None", "False")  # never True; False where the kernel has used the namespace's number again
