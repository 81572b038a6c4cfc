"""Supervises launches over the hosts of a hostfile: waits until hosts answer, chooses those that fit, and never starts a second launch
beside the first.

`choose` decides how many of the hosts that answer can carry the run. Only the data axis shrinks: pipe · tensor stays as it is, and the
batch stays the same, by more accumulation. `HostLauncher` does one launch with all that belongs to it.
"""

import itertools
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from parallel.errors import Mistake, listed, listed_up_to
from research.cluster.environment import environment, kept_alive_by_ssh
from research.cluster.hostfile import Host, text_of
from research.cluster.remote import MARK, Remote
from research.reliability.supervisor import GRACE_SECONDS, LONGEST_PAUSE, Launcher, say
from research.tracking.lock_record import beating
from research.tracking.run_folder import RunFolder

LONGEST_WAIT = 3600.0
"""Seconds to wait for hosts: a host that boots is back by then."""
SILENT_SECONDS = 30.0
"""Ranks of a host that does not answer have ended if their heartbeats on the shared disk do not change for so long."""
KILL_SECONDS = 30.0
"""How long processes of a launch are killed again before `supervise` gives up: one that waits for a dead disk cannot be killed."""
FIRST_WAIT = 5.0


@dataclass(frozen=True)
class Shape:
    """What the number of ranks must fit: the run's settings, as numbers."""

    pipe: int
    tensor: int
    batch_size: int
    micro_batch_size: int


class Choice(NamedTuple):
    """The hosts of a launch, in the hostfile's order, and the batch arithmetic on them."""

    hosts: list[Host]
    data: int
    """Data ranks."""
    micro_batch_size: int
    accumulated: int
    """Micro-batches per step and data rank: batch_size = micro_batch_size × accumulated × data."""


def choose(answering: Sequence[Host], shape: Shape) -> Choice | None:
    """The most hosts whose ranks fit the shape, and of those with as many hosts the ones with the most ranks; None if no number fits.

    The ranks must be a multiple of pipe · tensor, and the data ranks must divide the batch. If the data rank's share of the batch is not
    a multiple of micro_batch_size, the micro-batch is the largest divisor of that share below it.
    """
    by_slots: dict[int, list[Host]] = {}
    for host in answering:
        by_slots.setdefault(host.slots, []).append(host)
    best: tuple[tuple[int, int], list[Host]] | None = None
    for counts in itertools.product(*(range(len(hosts) + 1) for hosts in by_slots.values())):
        taken = [host for count, hosts in zip(counts, by_slots.values(), strict=True) for host in hosts[:count]]
        size = len(taken), sum(host.slots for host in taken)
        if taken and _data_ranks(size[1], shape) and (best is None or size > best[0]):
            best = size, taken
    if best is None:
        return None
    (_, ranks), taken = best
    data = _data_ranks(ranks, shape)
    share = shape.batch_size // data
    micro = next(size for size in range(min(shape.micro_batch_size, share), 0, -1) if share % size == 0)
    return Choice([host for host in answering if host in taken], data, micro, share // micro)


def _data_ranks(ranks: int, shape: Shape) -> int:
    """The number of data ranks of so many ranks; 0 if they do not fit."""
    data, rest = divmod(ranks, shape.pipe * shape.tensor)
    return data if not rest and data and shape.batch_size % data == 0 else 0


class HostLauncher:
    """Launches on the hosts of a hostfile, one launch at a time."""

    def __init__(self, command: Sequence[str], hosts: Sequence[Host], shape: Shape, folder: Path, shrink: bool, port: int | None) -> None:
        """`command` begins with `deepspeed … --hostfile FILE`; `folder` must be on each host; `port`: --ssh_port, if it is given."""
        self._command, self._hosts, self._shape, self._folder, self._shrink = list(command), list(hosts), shape, folder, shrink
        self._remote = Remote(port)
        self._used = list(hosts)
        """The hosts of the last launch."""
        self._launched = False

    def run(self, launcher: Launcher, settings: Sequence[str], last: RunFolder | None) -> int:
        """One launch with these settings: waits for hosts, launches, and waits until no process of it is left. Returns its exit code.

        `last`: the run of the launch before. If a signal comes while it waits, nothing is launched, and the code is −signal.
        """
        choice = self._gather(launcher, last)
        if choice is None:
            return -launcher.signal
        self._launched = True
        mark = uuid.uuid4().hex
        with tempfile.NamedTemporaryFile("w", prefix="hosts-", suffix=".txt") as hostfile:
            hostfile.write(text_of(choice.hosts) + "\n")
            hostfile.flush()
            command = [*self._with_hostfile(hostfile.name, alone=len(choice.hosts) == 1), *settings]
            if choice.micro_batch_size != self._shape.micro_batch_size:
                command += ["--schedule.micro_batch_size", str(choice.micro_batch_size)]
            with environment({MARK: mark, **kept_alive_by_ssh()}):
                code = launcher.run(command)
        self._used = choice.hosts
        self._wait_until_gone(launcher, [host.name for host in choice.hosts], mark)
        return code

    def _gather(self, launcher: Launcher, last: RunFolder | None) -> Choice | None:
        """The hosts of the next launch, once they answer and no rank of the last launch is left elsewhere. None: a signal came."""
        began, pause, said = time.monotonic(), FIRST_WAIT, ""
        while True:
            silent = self._remote.silent([host.name for host in self._hosts], self._folder)
            answering = [host for host in self._hosts if host.name not in silent]
            choice = self._choice(answering)
            reason = listed_up_to((f"{host} ({why})" for host, why in silent.items()), 4)
            if choice is not None:
                self._say_chosen(choice, answering, reason)
                if not self._is_still_running(last, silent):
                    return choice
                reason = f"ranks on {listed(silent, 'and')} still write heartbeats"
            elif not self._launched and not self._shrink:
                raise Mistake(f"no answer from {reason} → check `ssh HOST true` without a password, or add --shrink to go on without them")
            if time.monotonic() - began > LONGEST_WAIT:
                raise Mistake(f"waited {LONGEST_WAIT / 60:.0f} minutes for hosts: {reason} → mend them, and start again with --resume auto")
            if reason != said:
                say(f"waits for hosts: {len(answering)} of {len(self._hosts)} answer; {reason}")
            said = reason
            launcher.pause(pause)
            if launcher.signal:
                return None
            pause = min(2 * pause, LONGEST_PAUSE)

    def _choice(self, answering: list[Host]) -> Choice | None:
        """The launch on the hosts that answer: on all hosts exactly as it was asked for, on fewer only with --shrink."""
        if len(answering) == len(self._hosts):
            ranks = sum(host.slots for host in self._hosts)
            data = max(1, ranks // (self._shape.pipe * self._shape.tensor))  # whether this fits is for the launch to say
            micro = self._shape.micro_batch_size
            return Choice(answering, data, micro, max(1, self._shape.batch_size // (micro * data)))
        return choose(answering, self._shape) if self._shrink else None

    def _say_chosen(self, choice: Choice, answering: list[Host], silent: str) -> None:
        """Says which hosts the launch is on, if they are not those of the last launch."""
        if choice.hosts == self._used:
            return
        before = sum(host.slots for host in self._used) // (self._shape.pipe * self._shape.tensor)
        batch = f"{choice.micro_batch_size} micro × {choice.accumulated} accumulated × {choice.data} data"
        text = f"{len(self._used)} → {len(choice.hosts)} hosts, data {before} → {choice.data}: {self._shape.batch_size} sequences = {batch}"
        text += f"; no answer from {silent}" if silent else "; all hosts answer"
        if len(choice.hosts) < len(answering):
            unit = self._shape.pipe * self._shape.tensor
            left_out = [host.name for host in answering if host not in choice.hosts]
            text += f"; {listed_up_to(left_out, 4)} not used: with more hosts the ranks are no multiple of pipe × tensor = {unit}, "
            text += f"or the data ranks do not divide the batch of {self._shape.batch_size}"
        say(text)

    def _is_still_running(self, last: RunFolder | None, silent: dict[str, str]) -> bool:
        """Whether ranks of the last launch go on, on a host of it that does not answer: they write heartbeats to the shared disk."""
        if not self._launched or last is None or not any(host.name in silent for host in self._used):
            return False
        return bool(beating([last.lock], SILENT_SECONDS))

    def _wait_until_gone(self, launcher: Launcher, hosts: list[str], mark: str) -> None:
        """Waits until no process of the launch is left on the hosts that answer. Kills them after GRACE_SECONDS, or at a further signal.

        If they are still there KILL_SECONDS later, a Mistake names them: nothing must be launched beside them.
        """
        signals, kills_from = launcher.signals, time.monotonic() + GRACE_SECONDS
        while left := {host: numbers for host, numbers in self._remote.processes(hosts, mark).items() if numbers}:
            where = "; ".join(f"{host} {listed(numbers, 'and')}" for host, numbers in left.items())
            if launcher.signals > signals:
                kills_from = min(kills_from, time.monotonic())
            if time.monotonic() > kills_from + KILL_SECONDS:
                raise Mistake(
                    f"what the launch has left behind cannot be killed: {where} → end it there, then start again with --resume auto"
                )
            if time.monotonic() >= kills_from:
                say(f"kills what the launch has left behind: {where}")
                self._remote.kill([*left], mark)
            time.sleep(1.0)

    def _with_hostfile(self, path: str, alone: bool) -> list[str]:
        """The command with another hostfile. On one host, DeepSpeed would start the ranks here, whatever its name, unless it is told."""
        words, skip = [], False
        for word in self._command:
            if skip:
                words.append(path)
            elif word.startswith("--hostfile="):
                words.append(f"--hostfile={path}")
            else:
                words.append(word)
            skip = word in ("--hostfile", "-H")
        return [*words[:-1], "--force_multi", words[-1]] if alone and "--force_multi" not in words else words
