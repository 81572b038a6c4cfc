"""Concurrent starts, resumes and kills of one run on two hosts: never two writers, no row lost, every refusal names a holder."""

import contextlib
import random
import re
import secrets
import signal
import sys
import time
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

import psutil
import pytest

from parallel.files import read_json
from research import ROOT
from research.cluster.exit_codes import TAKEN, WRONG
from research.tracking import metrics, run_folder
from research.tracking.lock_record import newest
from research.tracking.run_folder import RunFolder
from tests.research.helpers.hosts import Cluster, Host
from tests.research.helpers.launches import LIMIT, Place

pytestmark = [pytest.mark.slow, pytest.mark.hosts]
PAIRS, PARTS = 100, 4
NAMED = re.compile(r"process (\d+) on (\S+), since ")


def start(host: Host, command: list[str], output: Path) -> Popen:
    """Starts a process on this host whose output goes to the file."""
    with output.open("ab") as said:
        return host.popen(command, ROOT, stdout=said, stderr=said)


def send(process: Popen, number: int) -> None:
    """Signals the process on its host, the child of nsenter, which has started it. nsenter stops with it, and must go on with it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        nsenter = psutil.Process(process.pid)
        while process.poll() is None and not nsenter.children():
            time.sleep(0.01)
        for each in [*nsenter.children(), *([nsenter] if number == signal.SIGCONT else [])]:
            each.send_signal(number)


def code_after(process: Popen, seconds: float) -> int | None:
    """The exit code of the process; None if it still runs after so many seconds."""
    try:
        return process.wait(seconds)
    except TimeoutExpired:
        return None


class Run:
    """A run's folder that pairs of tiny processes fight for, and what each of them says that it did."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.folder = run_folder.create(place / "runs", "mine")
        run_folder.start(self.folder, layout="", precision="fp32", steps=10_000)
        run_folder.end(self.folder, run_folder.INTERRUPTED)
        self.number = 0

    def begin(self, host: Host, flock: bool, rows: int) -> Popen:
        """Starts a process that takes the run on."""
        self.number += 1
        own = self.place / f"own_{self.number:04d}.jsonl"
        command = [sys.executable, "-m", "tests.research.helpers.lock_writer", str(self.folder.path), str(own)]
        return start(host, [*command, "--flock", str(int(flock)), "--rows", str(rows)], self.place / "said.txt")

    def told(self) -> list[dict[str, Any]]:
        """What all processes say that they did."""
        return [row for path in sorted(self.place.glob("own_*.jsonl")) for row in metrics.read(path)]


def disturb(dice: random.Random, process: Popen) -> None:
    """What happens to one of a pair: nothing, a kill, a signal that is obeyed, or a pause that is longer than others listen."""
    kind = dice.choice(["nothing", "kill", "kill", "end", "pause"])
    time.sleep(dice.uniform(0.3, 1.5))
    if kind == "pause":
        send(process, signal.SIGSTOP)
        time.sleep(dice.uniform(0.2, 4.0))
        send(process, signal.SIGCONT)
    elif kind != "nothing":
        send(process, signal.SIGKILL if kind == "kill" else signal.SIGTERM)


def stop_and_go_on(dice: random.Random, run: Run, begun: list[Popen], flock: bool, elsewhere: Host) -> None:
    """Stops all that run, starts one on the other host, and lets the stopped ones go on."""
    time.sleep(dice.uniform(0.5, 1.5))
    stopped = list(begun)
    for process in stopped:
        send(process, signal.SIGSTOP)
    begun.append(run.begin(elsewhere, flock, 150))
    time.sleep(dice.uniform(1.0, 6.0))
    for process in stopped:
        send(process, signal.SIGCONT)


@pytest.mark.parametrize("part", range(PARTS))
def test_a_hundred_pairs_on_two_hosts(part: int, cluster: Cluster, tmp_path: Path) -> None:
    """Half of them on a file system without flock, where only heartbeats and links tell. Each part is a run of its own."""
    seed = secrets.randbelow(10**6)
    print(f"part {part}, seed {seed}")
    dice, run, codes = random.Random(seed), Run(tmp_path), list[int | None]()
    a, b = cluster.hosts
    for _ in range(PAIRS // PARTS):
        flock, pair = dice.random() < 0.5, [dice.choice([a, b]) for _ in range(2)]
        begun = []
        for host in pair:
            begun.append(run.begin(host, flock, dice.randint(20, 150)))
            time.sleep(dice.choice([0.0, 0.0, dice.uniform(0.0, 0.6)]))
        if dice.random() < 0.2:  # one beside a stopped one, which wakes up when the other one has begun to write, or before
            begun.append(run.begin(pair[0], flock, 150))
            stop_and_go_on(dice, run, begun, flock, a if pair[0] is b else b)
        else:
            disturb(dice, dice.choice(begun))
        codes += [code_after(process, 60.0) for process in begun]
    counts = check(run.folder, run.told())
    print(f"{PAIRS // PARTS} pairs, exit codes { {code: codes.count(code) for code in set(codes)} }, {counts}")
    assert set(codes) <= {0, WRONG, TAKEN, -signal.SIGKILL, -signal.SIGTERM}, "SIGTERM ends a process that has not begun to write"
    assert codes.count(WRONG) > 2 and codes.count(-signal.SIGKILL) > 0


def check(folder: RunFolder, told: list[dict[str, Any]]) -> dict[str, int]:
    """Compares the run's files with what its writers say that they did; returns how much there was to compare."""
    holders = {(str(row["pid"]), row["host"]): row for row in told if "took" in row}
    starts = {row["took"]: row["at"] for row in told if "took" in row}
    assert len(starts) == sum("took" in row for row in told), "two processes had the lock with one number"

    kept, dropped = list(metrics.read(folder.metrics)), list(metrics.read(folder.path / "dropped.jsonl"))
    writers = [row["by"] for row in kept]
    assert writers == sorted(writers), "rows of two writers are mixed"
    assert [row["progress/step"] for row in kept] == list(range(1, len(kept) + 1)), "a row is lost, or there twice"

    # a row that its writer has written is kept or was dropped; unless the lock was taken over while the writer was stopped in its write
    there = {(row["by"], row["progress/step"]) for row in [*kept, *dropped]}
    written = [row for row in told if "by" in row]
    late = [row for row in written if any(row["by"] < number and at < row["at"] for number, at in starts.items())]
    lost = [row for row in written if (row["by"], row["progress/step"]) not in there]
    assert all(row in late for row in lost), lost
    assert len({row["by"] for row in late}) == len(late), "a writer has gone on after it had lost the lock"

    refused = [row["refused"] for row in told if "refused" in row]
    for sentence in refused:
        assert (match := NAMED.search(sentence)) and match.groups() in holders, sentence
    return {"holders": len(starts), "refusals": len(refused), "rows": len(written), "dropped": len(dropped), "written too late": len(late)}


def test_the_check_finds_two_writers(tmp_path: Path) -> None:
    """Rows of two that write at once, and a row that nobody has."""
    run = Run(tmp_path)
    took = [{"took": number, "pid": number, "host": "a", "at": float(number)} for number in (1, 2)]
    rows = [{"progress/step": step, "by": by} for step, by in ((1, 1), (2, 2), (3, 1))]
    run.folder.metrics.write_text("".join(metrics.encode(row) + "\n" for row in rows))
    with pytest.raises(AssertionError, match="rows of two writers are mixed"):
        check(run.folder, took)
    run.folder.metrics.write_text(metrics.encode(rows[0]) + "\n")
    with pytest.raises(AssertionError):
        check(run.folder, [*took, {"progress/step": 2, "by": 1, "at": 1.5}])
    with pytest.raises(AssertionError, match="process 7 on b"):
        check(run.folder, [*took, {"refused": "mine-x is running (process 7 on b, since now) → wait", "at": 1.0}])
    assert read_json(run.folder.run)["status"] == "interrupted"


class Trainings:
    """Real trainings of one run, on hosts that see one disk."""

    def __init__(self, place: Place, **settings: Any) -> None:
        self.place, self.number = place, 0
        settings = {"schedule.steps": 100_000, "schedule.validate_every": 0, "schedule.log_every": 1, "checkpoints.every": 50} | settings
        self.command = [sys.executable, "experiments/gpt_sotu/launch.py", *place.settings(settings), "--resume", "auto"]

    def begin(self, host: Host) -> tuple[Host, Popen, Path]:
        """Starts `--resume auto` on this host; returns the host, the process and its output."""
        self.number += 1
        output = self.place.path / f"training_{self.number}.txt"
        return host, start(host, self.command, output), output

    def until(self, output: Path, words: str) -> str:
        """Waits until the output has these words."""
        deadline = time.monotonic() + LIMIT
        while words not in (said := output.read_text(errors="replace")):
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        return said

    def until_rows(self, more: int) -> None:
        """Waits until the only run has so many rows more than now."""
        begun, deadline = len(self.rows()), time.monotonic() + LIMIT
        while len(self.rows()) < begun + more:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    @property
    def folder(self) -> RunFolder:
        (folder,) = run_folder.every(self.place.runs)
        return folder

    def rows(self) -> list[dict[str, Any]]:
        return list(metrics.read(self.folder.metrics)) if run_folder.every(self.place.runs) else []

    def holder(self) -> str:
        """The living holder of the run, as a refusal names it."""
        owner = newest(self.folder.lock)
        assert owner and not owner.released
        return f"({owner})"


def test_pairs_of_real_trainings_on_two_hosts(cluster: Cluster) -> None:
    """Seven pairs: begun at once with no run and with one, on two hosts and on one, beside a running, a stopped and a killed one.

    What is left of the run equals a run that nobody disturbed, row by row, as hexadecimal floats.
    """
    trainings, (a, b) = Trainings(cluster.place), cluster.hosts
    # two that begin at once: nothing is there
    winner, loser = ended_first([trainings.begin(a), trainings.begin(b)])
    assert "a run of gpt_sotu with these settings is in use by `--resume auto` (process " in loser.read_text()
    trainings.until_rows(120)
    for host in (b, a):  # one beside a running one, from elsewhere and from the same host
        refused(trainings, trainings.begin(host))
    host, process, output = winner  # a stopped one lives
    send(process, signal.SIGSTOP)
    refused(trainings, trainings.begin(b if host is a else a))
    send(process, signal.SIGCONT)
    trainings.until_rows(60)
    send(process, signal.SIGKILL)  # a killed one is listened to, and then its run goes on elsewhere
    other = b if host is a else a
    host, process, output = trainings.begin(other)
    assert "its heartbeat is watched for 30 s" in trainings.until(output, "resume   step ")
    trainings.until_rows(60)
    send(process, signal.SIGUSR1)
    assert code_after(process, LIMIT) == 128 + signal.SIGUSR1
    for pair in ([a, b], [a, a]):  # two that resume at once
        (host, process, output), loser = ended_first([trainings.begin(host) for host in pair])
        trainings.until_rows(60)
        send(process, signal.SIGUSR1)
        assert code_after(process, LIMIT) == 128 + signal.SIGUSR1
    alone = Trainings(Place(cluster.place.path / "alone"))
    host, process, output = alone.begin(a)
    trainings.until(output, "\n    1 ")
    alone.until_rows(len(trainings.rows()))
    send(process, signal.SIGKILL)
    losses = [(row["progress/step"], float(row["train/loss"]).hex()) for row in trainings.rows()]
    assert losses == [(row["progress/step"], float(row["train/loss"]).hex()) for row in alone.rows()][: len(losses)]
    assert [step for step, _ in losses] == list(range(1, len(losses) + 1))
    assert len(read_json(trainings.folder.run)["segments"]) == 4


def ended_first(begun: list[tuple[Host, Popen, Path]]) -> tuple[tuple[Host, Popen, Path], Path]:
    """(the one that trains, the output of the other one, which was refused with exit code 2)."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        for one, other in (begun, begun[::-1]):
            host, process, output = one
            if (code := code_after(process, 0.1)) is not None:
                said = output.read_text()
                *listened, error = said.splitlines()
                assert code == WRONG and error.startswith("error  ") and NAMED.search(error) and len(listened) <= 1, said
                return other, output
    raise AssertionError([output.read_text() for _, _, output in begun])


def refused(trainings: Trainings, begun: tuple[Host, Popen, Path]) -> None:
    """It ends with exit code 2 and a sentence that names the holder."""
    host, process, output = begun
    code, said = code_after(process, LIMIT), output.read_text()
    assert code == WRONG and f"error  {trainings.folder.title} is running {trainings.holder()}" in said, said
