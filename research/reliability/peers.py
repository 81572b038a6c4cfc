"""Knows the other ranks while they train together: their processes, which of them have left, which are silent, which one reports.

`Neighbours` are the ranks of this machine, whose processes can be observed; `PeerMonitor` adds the heartbeats of all ranks.
"""

import contextlib
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from parallel.grid import Grid
from parallel.process_identity import ProcessIdentity
from research.reliability.heartbeat import Heartbeat, Heartbeats, Progress
from research.tracking.lock_record import changing
from research.tracking.run_folder import RunFolder


class Lost(RuntimeError):
    """The run cannot go on because of another rank. Holds a sentence, empty unless this rank is to print it, and an exit code."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True)
class Peer:
    """One rank and its process."""

    rank: int
    process: ProcessIdentity

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.process})"


def all_peers(rank: int, world: int) -> list[Peer]:
    """All ranks in order. Collective."""
    from parallel.object_collectives import all_gather_objects

    return all_gather_objects(Peer(rank, ProcessIdentity.current()), Grid(data=world, rank=rank))


class Neighbours:
    """The other ranks of this machine, each known by more than its pid: a process that has inherited the pid is not taken for the rank."""

    def __init__(self, peers: list[Peer], rank: int) -> None:
        """Those of `peers` that run on `rank`'s machine; all are alive when this is called."""
        here = peers[rank].process
        others = {peer.rank: peer.process for peer in peers if peer.rank != rank and peer.process.same_machine(here)}
        self._processes = {other: process for other, process in others.items() if process.find()}

    def gone(self) -> set[int]:
        """Ranks whose process has ended."""
        return {rank for rank, process in self._processes.items() if not process.find()}

    def kill(self, rank: int) -> bool:
        """Sends SIGKILL to that rank's process; returns False if it is on another machine or has ended."""
        if rank in self._processes and (process := self._processes[rank].find()):
            with contextlib.suppress(psutil.Error):
                process.kill()  # psutil checks once more that it is still the same process
                return True
        return False


class PeerMonitor:
    """The other ranks once all have met. Its methods are called by several threads."""

    def __init__(self, folder: RunFolder, rank: int, world: int, root: Path, progress: Progress) -> None:
        """Collective. `progress` is this rank's; files in stacks are named relative to `root`."""
        self.folder, self.rank, self._progress = folder, rank, progress
        self._departure: dict[str, Any] = {}
        self._vanished: dict[int, Heartbeat] = {}
        self._main = threading.main_thread().ident or 0
        self.heartbeats = Heartbeats(folder, rank, world, root)
        self.heartbeats.write(self.heartbeat())  # before any other rank may look for it
        self.peers: list[Peer] = all_peers(rank, world)
        if rank == 0:
            self.heartbeats.remove_stale()
        self.neighbours = Neighbours(self.peers, rank)
        self._can_write = True

    def heartbeat(self) -> Heartbeat:
        """A new heartbeat of this rank."""
        return self.heartbeats.next(self._progress, self._main, **self._departure)

    def announce(self, left: str, why: str, code: int) -> None:
        """Tells the other ranks that this one leaves: writes a heartbeat that says so, as all later ones do."""
        self._departure = {"left": left, "why": why, "code": code}
        self.heartbeats.write(self.heartbeat())

    def beat(self, seconds: float, read_others: bool) -> None:
        """Writes this rank's heartbeat and, if asked to, reads the others'. `seconds` have passed since the last call."""
        self._can_write = self.heartbeats.write(self.heartbeat())
        if read_others:
            self.heartbeats.read_others(seconds)
        else:
            self.heartbeats.reset_silence()

    def lost(self) -> dict[int, Heartbeat]:
        """Ranks that have left before the end, and their last heartbeats. A rank that ends as it should removes its file first."""
        left = {rank: heartbeat for rank, heartbeat in self.heartbeats.latest.items() if heartbeat.left}
        return left | {rank: heartbeat for rank in self.neighbours.gone() if (heartbeat := self.heartbeats.read(rank))} | self._vanished

    def silent(self, seconds: float) -> set[int]:
        """Ranks without a heartbeat for so long; none if this rank's cannot be written either: then it is the file system."""
        return {rank for rank, silence in self.heartbeats.silence.items() if silence >= seconds} if self._can_write else set()

    def vanished(self, seconds: float) -> dict[int, Heartbeat]:
        """Ranks of other machines whose heartbeat does not change for so long, and their last ones. Waits as long, unless all change.

        From then on they are lost. No rank is taken for vanished if this one cannot write either: then it is the file system.
        """
        here = self.peers[self.rank].process
        elsewhere = [peer.rank for peer in self.peers if not peer.process.same_machine(here)]
        last = {rank: heartbeat for rank in elsewhere if (heartbeat := self.heartbeats.read(rank))}
        changed = changing(last, seconds, self.heartbeats.read)
        self._vanished = {rank: last[rank] for rank in last.keys() - changed} if self._can_write else {}
        return self._vanished

    def reports(self, unable: set[int]) -> bool:
        """Whether this rank reports for all: it is the first that is not `unable`."""
        return self.rank == min({peer.rank for peer in self.peers} - unable, default=self.rank)
