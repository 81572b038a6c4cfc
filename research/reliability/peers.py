"""The ranks as processes: on which machine each one runs, and whether those of this machine still do."""
# MERGED-DOC """What a rank knows of the others while they train together: who they are, who has left, who is silent, who speaks for all."""

import contextlib
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from parallel.grid import Grid
from research.reliability.heartbeat import Heartbeat, Heartbeats, Progress
from research.tracking.run_folder import RunFolder

SAME_START = 5.0
"""Seconds by which two ranks may disagree on when a process began: the machine's clock may have been set in between."""


class Lost(RuntimeError):
    """The run cannot go on because of another rank: a sentence where it falls to this rank to say it, and an exit code."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True)
class Peer:
    """One rank's process."""

    rank: int
    host: str
    machine: str
    """Equal for two ranks exactly where they can see each other's process: one boot, one namespace of process numbers."""
    pid: int
    started: float
    """Seconds since the epoch; with the pid it names a process for good."""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def this_process(rank: int) -> Peer:
    """This rank."""
    return Peer(rank, socket.gethostname(), _machine(), os.getpid(), psutil.Process().create_time())


def all_peers(rank: int, world: int) -> list[Peer]:
    """All ranks in order. Collective."""
    from parallel.object_collectives import all_gather_objects

    return all_gather_objects(this_process(rank), Grid(data=world, rank=rank))


class Neighbours:
    """The other ranks of this machine, each held by more than its number: no process that has inherited one is taken for it."""

    def __init__(self, peers: list[Peer], rank: int) -> None:
        """Of `peers`, those on `rank`'s machine; all are alive when this is called."""
        here = [peer for peer in peers if peer.rank != rank and peer.machine == peers[rank].machine]
        found = [(peer.rank, _process(peer)) for peer in here]
        self._processes = {rank: process for rank, process in found if process}

    def gone(self) -> set[int]:
        """Ranks whose process has ended."""
        return {rank for rank, process in self._processes.items() if not _alive(process)}

    def kill(self, rank: int) -> bool:
        """SIGKILL to that rank's process; False where it is none of this machine or has ended."""
        with contextlib.suppress(psutil.Error):
            if rank in self._processes:
                self._processes[rank].kill()  # psutil looks first whether it is still the same process
                return True
        return False


def _process(peer: Peer) -> psutil.Process | None:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(peer.pid)
        return process if abs(process.create_time() - peer.started) < SAME_START else None
    return None


def _alive(process: psutil.Process) -> bool:
    """Not so for one that has ended and whose parent has not asked for its exit code yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _machine() -> str:
    """The boot and the namespace where Linux tells them, else the host's name."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return socket.gethostname()


class Peers(Protocol):
    """The other ranks, as far as they are known."""

    def lost(self) -> dict[int, Heartbeat]:
        """Ranks that have left before the end, and their last signs."""
        ...

    def silent(self, seconds: float) -> set[int]:
        """Ranks without a sign of life for so long."""
        ...


class NoPeers:
    """The others before they have met."""

    def lost(self) -> dict[int, Heartbeat]:
        """Nobody is known, nobody missed."""
        return {}

    def silent(self, seconds: float) -> set[int]:
        """Nobody is heard."""
        return set()


class PeerMonitor:
    """The others once all have met. Its methods are called by several threads."""

    def __init__(self, folder: RunFolder, rank: int, world: int, root: Path, progress: Progress) -> None:
        """Collective."""
        self.folder, self.rank, self._progress = folder, rank, progress
        self._main = threading.main_thread().ident or 0
        self.signs = Heartbeats(folder, rank, world, root)
        self.signs.give(self.own())  # before any other rank may look for it
        self.peers: list[Peer] = all_peers(rank, world)
        if rank == 0:
            self.signs.forget_others()
        self.neighbours = Neighbours(self.peers, rank)
        self._gives = True

    def own(self) -> Heartbeat:
        """This rank as it is now."""
        return self.signs.own(self._progress, self._main)

    def listen(self, seconds: float, closely: bool) -> None:
        """Leave a sign of life; `closely`: and read those of the others. `seconds` have passed since the last time."""
        self._gives = self.signs.give(self.own())
        if closely:
            self.signs.listen(seconds)
        else:
            self.signs.rest()

    def lost(self) -> dict[int, Heartbeat]:
        """Ranks that have left before the end, and their last signs: one that ends as it should takes its sign away first."""
        said = {rank: sign for rank, sign in self.signs.heard.items() if sign.left}
        return said | {rank: sign for rank in self.neighbours.gone() if (sign := self.signs.read(rank))}

    def silent(self, seconds: float) -> set[int]:
        """Ranks without a sign of life for so long; none where this one's signs are refused, too: then it is the file system."""
        return {rank for rank, silence in self.signs.silence.items() if silence >= seconds} if self._gives else set()

    def speaks(self, mute: set[int]) -> bool:
        """One rank speaks for all: the first that can."""
        return self.rank == min({peer.rank for peer in self.peers} - mute, default=self.rank)
