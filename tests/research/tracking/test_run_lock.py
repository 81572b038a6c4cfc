"""The lock of a run: one holder among processes and hosts, its heartbeat, and what a holder does that has lost it."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from parallel.errors import Mistake
from parallel.process_identity import ProcessIdentity
from research import ROOT
from research.cluster import exit_codes
from research.tracking import acquire_lock, lock_record, run_lock
from research.tracking.acquire_lock import Held, is_held, take
from research.tracking.lock_record import Owner, beating, encoded, newest, path_of
from research.tracking.run_lock import LockView, RunLock, State
from tests.parallel.test_process_identity import IN_A_NAMESPACE, can_unshare

HOLDS = """
import sys, time
from pathlib import Path
from research.tracking import acquire_lock, lock_record, run_lock
lock_record.BEAT_SECONDS = run_lock.BEAT_SECONDS = 0.05
acquire_lock.WATCH_SECONDS, acquire_lock.SETTLE_SECONDS = 0.6, 0.2
lock = acquire_lock.take(Path(sys.argv[1]), "gpt-aaaaaa")
print("held", flush=True)
sys.stdin.read()
lock.check()
print("wrote", flush=True)
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats and waits take tens of milliseconds instead of seconds, in the same proportions."""
    for module in (lock_record, run_lock):
        monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(acquire_lock, "WATCH_SECONDS", 0.2)
    monkeypatch.setattr(acquire_lock, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "FLOCK_SECONDS", 0.05)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the lock of a run goes."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "lock"


@contextlib.contextmanager
def holder(place: Path, in_a_namespace: bool = False) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock, on this host or where it cannot be seen."""
    command = [*(IN_A_NAMESPACE if in_a_namespace else []), sys.executable, "-c", HOLDS, str(place)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        try:
            assert process.stdout and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def elsewhere(place: Path, number: int = 1, **changes: object) -> Path:
    """A record of a holder on another host, which this process cannot see."""
    place.mkdir(exist_ok=True)
    process = replace(ProcessIdentity.current(), boot_id="another", host="node7", pid=1)
    record = {
        "token": "theirs",
        "purpose": "training",
        "since": "2026-01-31T12:00:00+00:00",
        "released": False,
        **asdict(process),
        **changes,
    }
    path_of(place, number).write_bytes(encoded(record))
    return path_of(place, number)


def test_one_process_holds_it_and_the_next_is_told_who(place: Path) -> None:
    lock = take(place, "gpt-aaaaaa")
    owner = newest(place)
    assert owner and owner.process == ProcessIdentity.current() and is_held(place)
    with pytest.raises(Held) as refused:
        take(place, "gpt-aaaaaa")
    who = f"process {os.getpid()} on {ProcessIdentity.current().host}, since {owner.since}"
    assert str(refused.value) == f"gpt-aaaaaa is running ({who}) → wait for its end, or end it: kill -USR1 {os.getpid()}"
    lock.release()
    assert is_held(place) is False
    take(place, "gpt-aaaaaa").release()
    assert [path.name for path in sorted(place.glob("*.json"))] == ["000001.json", "000002.json"]


def test_it_beats_from_the_moment_it_is_taken_and_not_after_it_is_released(place: Path) -> None:
    lock = take(place, "gpt-aaaaaa")
    assert beating([place], 1.0) == {place}
    lock.release()
    assert beating([place], 0.3) == set()


def test_a_killed_holder_leaves_it_at_once(place: Path) -> None:
    """The kernel gives the flock back, and the process can be seen to have ended: nothing is waited for."""
    with holder(place) as process:
        with pytest.raises(Held, match=f"process {process.pid} on "):
            take(place, "gpt-aaaaaa")
        process.kill()
        process.wait()
        began = time.monotonic()
        lock = take(place, "gpt-aaaaaa")
        assert time.monotonic() - began < acquire_lock.WATCH_SECONDS and lock.number == 2
        lock.release()


def test_a_strangers_process_with_the_number_does_not_hold_it(place: Path) -> None:
    me = ProcessIdentity.current()
    elsewhere(place, **asdict(replace(me, started_after_boot=me.started_after_boot - 100)))
    take(place, "gpt-aaaaaa").release()


@pytest.mark.slow
@pytest.mark.skipif(not can_unshare(), reason="a pid namespace may not be made here")
def test_a_holder_that_cannot_be_seen_is_known_by_its_flock_and_its_heartbeat(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As process 1 of another container. Without flock it is the heartbeat; killed, it is passed over after it was listened to."""
    said: list[str] = []
    monkeypatch.setattr(acquire_lock, "WATCH_SECONDS", 2.0)
    with holder(place, in_a_namespace=True) as process:
        assert is_held(place) is True
        with pytest.raises(Held, match="process 1 on .*: it cannot be seen from here, but it holds the lock → .* there: kill -USR1 1"):
            take(place, "gpt-aaaaaa", report=said.append)
        assert said == []
        monkeypatch.setattr(lock_record.fcntl, "flock", no_flock)
        with pytest.raises(Held, match="it cannot be seen from here, but its heartbeat goes on"):
            take(place, "gpt-aaaaaa", report=said.append)
        assert is_held(place) is None and len(said) == 1 and "its heartbeat is watched for" in said[0]
        process.kill()
        process.wait()
    take(place, "gpt-aaaaaa").release()


def no_flock(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_it_is_one_without_flock_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_record.fcntl, "flock", no_flock)
    lock = take(place, "gpt-aaaaaa")
    with pytest.raises(Held):
        take(place, "gpt-aaaaaa")
    lock.release()


def test_a_file_system_without_links_makes_the_record_exclusively(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(source: Path, target: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(lock_record.os, "link", no_link)
    lock = take(place, "gpt-aaaaaa")
    assert not lock_record.claim(place, lock.number, "other", encoded({"token": "other"})) and lock.state() is State.OURS
    lock.release()


def test_a_link_that_the_server_repeats_is_the_claimants_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS repeats a request whose answer is lost; the second answer says that the file is there."""
    link = os.link

    def answered_twice(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(lock_record.os, "link", answered_twice)
    take(place, "gpt-aaaaaa").release()


def test_a_silent_holder_elsewhere_is_listened_to_and_then_passed_over(place: Path) -> None:
    record, said = elsewhere(place), list[str]()
    began = time.monotonic()
    lock = take(place, "gpt-aaaaaa", report=said.append)
    assert time.monotonic() - began >= acquire_lock.WATCH_SECONDS + acquire_lock.SETTLE_SECONDS
    assert said == ["gpt-aaaaaa may be in use by process 1 on node7, since 2026-01-31T12:00:00+00:00: its heartbeat is watched for 0 s …"]
    assert LockView(place, 1, "theirs").state() is State.TAKEN and lock.number == 2
    assert json.loads(record.read_bytes())["released"]
    lock.release()


def test_a_rank_of_a_silent_rank_0_is_a_sign_of_life(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(place)
    heartbeat = place.parent / "logs" / "rank_3.alive.json"
    heartbeat.parent.mkdir()
    beats = iter(range(1000))
    sleep = time.sleep
    monkeypatch.setattr(lock_record.time, "sleep", lambda seconds: (heartbeat.write_text(f"{next(beats)}"), sleep(seconds)))
    with pytest.raises(Held, match="its heartbeat goes on"):
        take(place, "gpt-aaaaaa")


@pytest.mark.parametrize("content", [b"", b"[]"])
def test_a_record_that_cannot_be_read_is_a_holder_until_it_was_listened_to(content: bytes, place: Path) -> None:
    """A process that was killed while it made its record, on a file system without links."""
    place.mkdir()
    path_of(place, 4).write_bytes(content)
    assert newest(place) == Owner(4, None) and is_held(place) is None
    lock = take(place, "gpt-aaaaaa")
    assert lock.number == 5
    lock.release()


def test_nothing_of_a_strangers_folder_blocks(place: Path) -> None:
    place.mkdir()
    os.mkfifo(path_of(place, 1))
    os.mkfifo(place / lock_record.FLOCK)
    assert is_held(place) is None
    assert take(place, "gpt-aaaaaa").number == 2


def test_of_two_contenders_at_once_one_wins_and_the_other_names_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second has listened to the dead holder, too, and is about to claim when the first has it."""
    elsewhere(place)
    winner: list[RunLock] = []
    claim = lock_record.claim

    def late(*arguments: object) -> bool:
        monkeypatch.setattr(acquire_lock, "claim", claim)
        winner.append(take(place, "gpt-aaaaaa"))
        return claim(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(acquire_lock, "claim", late)
    with pytest.raises(Held, match=f"process {os.getpid()} on "):
        take(place, "gpt-aaaaaa")
    assert winner[0].state() is State.OURS
    winner[0].release()


def test_a_contender_that_slept_through_other_holders_does_not_hold_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number is used up even if the records of those in between were removed."""
    elsewhere(place, released=True)
    claim = lock_record.claim

    def after_a_nap(*arguments: object) -> bool:
        monkeypatch.setattr(acquire_lock, "claim", claim)
        for _ in range(acquire_lock.KEPT_RECORDS + 4):
            take(place, "gpt-aaaaaa").release()
        return claim(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(acquire_lock, "claim", after_a_nap)
    lock = take(place, "gpt-aaaaaa")
    assert lock.number == acquire_lock.KEPT_RECORDS + 6 and lock.state() is State.OURS
    assert len(list(place.glob("*.json"))) <= acquire_lock.KEPT_RECORDS + 2
    lock.release()


def test_a_stopped_holder_that_wakes_up_writes_nothing_more(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no flock that says that it is alive, and where it cannot be seen: as a frozen container on another host."""
    with holder(place) as process:
        os.kill(process.pid, signal.SIGSTOP)
        mine = newest(place)
        assert mine and mine.process
        hidden = encoded({**json.loads(path_of(place, 1).read_bytes()), "boot_id": "another", "host": "node7"})
        path_of(place, 1).write_bytes(hidden)
        monkeypatch.setattr(lock_record.fcntl, "flock", no_flock)
        lock = take(place, "gpt-aaaaaa")
        assert process.stdin
        process.stdin.close()  # once awake it wants to write
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(20) == exit_codes.TAKEN
        assert process.stdout and process.stderr and process.stdout.read() == ""
        said = process.stderr.read()
        assert said.startswith(f"error  gpt-aaaaaa was taken over by process {os.getpid()} on ") and said.count("\n") == 1
        assert "it stops and writes nothing more → " in said
        lock.release()


def test_a_lock_that_was_removed_is_noticed_and_can_be_made_again(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The whole folder of the run, as by `rm -r`: nobody else has it, so a last checkpoint may be written."""
    lock = take(place, "gpt-aaaaaa")
    shutil.rmtree(place.parent)
    deadline = time.monotonic() + 10
    while not lock.removed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lock.removed and lock.state() is State.REMOVED
    assert capfd.readouterr().err == "error  the folder was deleted under gpt-aaaaaa: it ends after this step, with a last checkpoint\n"
    lock.check()  # it may still write
    assert lock.restore() and lock.state() is State.OURS
    lock.release()


def test_a_lock_that_was_removed_and_taken_by_another_is_lost(place: Path) -> None:
    codes: list[int] = []
    lock = take(place, "gpt-aaaaaa", leave=codes.append)
    lock._closed.set()  # its thread is slow
    shutil.rmtree(place)
    elsewhere(place)
    with pytest.raises(SystemExit):
        lock.check()
    assert codes == [exit_codes.TAKEN] and not lock.restore()


def test_how_a_run_ended_is_kept_in_a_record_of_the_same_size(place: Path) -> None:
    """On a full disk the record can be overwritten in place, and nothing else can be written. Too long a reason is cut."""
    lock = take(place, "gpt-aaaaaa")
    assert lock.keep_end({"status": "failed", "reason": "ü" * 5000, "code": 4})
    owner = newest(place)
    assert owner and owner.end["status"] == "failed" and owner.end["code"] == 4 and len(owner.end["reason"]) == 300
    assert path_of(place, 1).stat().st_size == lock_record.RECORD_BYTES
    lock.release()
    assert newest(place).end["status"] == "failed"  # type: ignore[union-attr]


def test_a_temporary_lock_leaves_no_folder(place: Path) -> None:
    lock = take(place / "below", "the start", temporary=True)
    (place.parent / "other").mkdir()
    lock.release()
    assert [path.name for path in place.parent.iterdir()] == ["other"]
    lock.release()


def test_a_contender_that_slept_while_the_folder_was_replaced_does_not_take_it_from_its_new_holder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A temporary lock's folder goes with its holder, and the next one counts from 1 again, as the dead one did that was read."""
    below = place / "below"
    below.mkdir(parents=True)
    elsewhere(below, released=True)
    claim, new = lock_record.claim, list[RunLock]()

    def after_a_nap(*arguments: object) -> bool:
        monkeypatch.setattr(acquire_lock, "claim", claim)
        take(below, "the start", temporary=True).release()
        new.append(take(below, "the start", temporary=True))
        new[0]._closed.set()  # its thread is slow
        return claim(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(acquire_lock, "claim", after_a_nap)
    with pytest.raises(Held, match=f"the start is running .process {os.getpid()} on "):
        take(below, "the start", temporary=True)
    assert new[0].number == 1 and new[0].state() is State.OURS and [path.name for path in below.glob("*.json")] == ["000001.json"]
    new[0]._drop_flock()


def test_a_holder_that_took_the_place_of_the_one_that_is_listened_to_is_not_taken_for_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that was read is dead. Its number is in use again, by a process that can be seen and has not beaten yet."""
    record = elsewhere(place)

    def replaced(places: object, seconds: float, is_over: object) -> set[Path]:
        record.write_bytes(encoded({**json.loads(record.read_bytes()), **asdict(ProcessIdentity.current()), "token": "new"}))
        return set()

    monkeypatch.setattr(acquire_lock, "beating", replaced)
    with pytest.raises(Held, match=f"process {os.getpid()} on "):
        take(place, "gpt-aaaaaa")


def test_a_folder_that_is_deleted_under_a_verb_promises_no_checkpoint(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lock = take(place, "gpt-aaaaaa", purpose="track")
    shutil.rmtree(place.parent)
    deadline = time.monotonic() + 10
    while not lock.removed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert capfd.readouterr().err == "error  the folder was deleted under gpt-aaaaaa, which `track` is at work on\n"
    lock.release()


def test_a_full_disk_gives_no_lock(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        take(place, "gpt-aaaaaa")
    assert list(place.glob("*.json")) == []


def test_endless_rivals_are_a_sentence(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acquire_lock, "claim", lambda *arguments: False)
    with pytest.raises(Mistake, match="20 other processes have taken its lock"):
        take(place, "gpt-aaaaaa")
