"""Decides when a rank must leave, and says why: a signal that was not obeyed in time, a lost rank, a hang. Touches no process.

`Diagnoser` is asked once per second. It adds up the seconds between these checks instead of reading a clock: while the whole job was
suspended (Ctrl-Z, a closed laptop), nothing has waited. The functions below it turn the ranks' heartbeats into a sentence that
names the rank at fault.
"""

import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from research.cluster.exit_codes import HUNG, SIGNALLED
from research.reliability.heartbeat import FAULT, HANG, OTHERS, SIGNAL, Heartbeat, Progress, Stage
from research.reliability.parents import LAUNCHER_GONE, Parents
from research.reliability.peers import Peer, PeerMonitor

PATIENCE = {Stage.START: 5.0, Stage.TRAINING: 20.0, Stage.LEAVING: 15.0}
"""Seconds from a signal until the main thread must have done what is asked; a checkpoint may take as long as it takes."""
PATIENCE_STEPS = 3
"""Patience is at least this many times the last step, so that steps that are long by nature are not cut off."""
LOST_PEER_SECONDS, CLOSING_SECONDS = 5.0, 10.0
"""Left to the main thread to find out by itself that another rank is gone (gloo raises, NCCL waits), and then to close its files."""
STOPPED_SECONDS = 8.0
"""Another rank without a heartbeat for this long is taken for stopped when this one has to leave."""
FROM_ANOTHER_RANK = re.compile(
    r"\bgloo\b|nccl|connection (closed|reset|refused)|broken pipe|TCPStore|Dist(Backend|Network|Store)Error", re.I
)
"""Matches exceptions of torch's that may be caused by another rank's end."""
FIND_OUT_SECONDS = 5.0
"""After such an exception, how long to wait for another rank's end to become known."""
CAUSES_FIRST = ("", FAULT, SIGNAL, HANG, OTHERS)
"""Reasons to leave, causes before effects: a rank that was killed has given no reason; one that left because of others comes last."""


@dataclass(frozen=True)
class Diagnosis:
    """Why this rank leaves, and with which exit code."""

    code: int
    left: str
    """One of research.reliability.heartbeat.LEFT."""
    why: str


class Diagnoser:
    """Checks, once per second, whether this rank must leave. Used by the watchdog's thread."""

    def __init__(self, progress: Progress, parents: Parents, hang_seconds: float, start_seconds: float = 0.0) -> None:
        """`hang_seconds` without progress are a hang; 0: hangs are not looked for.

        Until the end of the first step it takes at least `start_seconds`: building a model, and the first use of each kernel and
        connection, take as long as they take, however short the steps are.
        """
        self.peers: PeerMonitor | None = None
        """The other ranks; None until all have met."""
        self.signal = 0
        """The first signal received; 0: none."""
        self.idle = 0.0
        """Seconds since this rank's progress has last moved."""
        self._progress, self._parents = progress, parents
        self._hang_limit, self._start_limit = hang_seconds, max(hang_seconds, start_seconds) if hang_seconds else 0.0
        self._moves, self._since_signal, self._since_lost = -1, 0.0, 0.0

    def check(self, seconds: float) -> Diagnosis | None:
        """One check, `seconds` after the last; a diagnosis if this rank must leave."""
        # count; time in which a checkpoint is saved does not count against a signal
        stage, moves = self._progress.stage, self._progress.moves
        self.idle = self.idle + seconds if moves == self._moves else 0.0
        self._moves = moves
        lost = self.peers.lost() if self.peers else {}
        self._since_signal = self._since_signal + seconds if self.signal and stage is not Stage.SAVING else 0.0
        self._since_lost = self._since_lost + seconds if lost else 0.0

        if self.peers and self._since_lost >= (CLOSING_SECONDS if stage is Stage.LEAVING else LOST_PEER_SECONDS):
            return diagnose_lost(lost, self.peers.peers)
        if self.signal and self._since_signal >= self._patience():
            return Diagnosis(SIGNALLED + self.signal, SIGNAL, f"{self.reason_of(self.signal)}, but {self._describe_hang()}")
        # a hang: nothing moves here, or another rank is silent, even while this one waits for work of unknown length
        idle = self.idle >= self._hang_seconds and not self._progress.busy and self._can_tell_who_is_stopped()
        if self._hang_seconds and (idle or self._silent(self._hang_seconds)):
            return Diagnosis(HUNG, HANG, self._describe_hang())
        return None

    @property
    def _hang_seconds(self) -> float:
        """The seconds without progress that are a hang at this moment."""
        return self._hang_limit if self._progress.has_stepped else self._start_limit

    def suspects_others(self) -> bool:
        """Whether it is time to read the other ranks' heartbeats."""
        return bool(self.signal or (self._hang_seconds and self.idle >= self._hang_seconds / 10))

    def stopped(self) -> set[int]:
        """Other ranks that are taken for stopped, now that this one has to leave."""
        return self._silent(self._silence_of_stopped())

    def _can_tell_who_is_stopped(self) -> bool:
        """Whether the others have been watched for longer than it takes to take one for stopped: if not, it would be left behind."""
        return self.peers is None or self.peers.heartbeats.watched > self._silence_of_stopped()

    def _silence_of_stopped(self) -> float:
        """Seconds without a heartbeat after which a rank is taken for stopped."""
        return min(STOPPED_SECONDS, self._hang_seconds / 2 or STOPPED_SECONDS)

    def _silent(self, seconds: float) -> set[int]:
        return self.peers.silent(seconds) if self.peers else set()

    def reason_of(self, number: int) -> str:
        """Why the run was asked to stop with this signal; '' for no signal (0)."""
        if number == signal.SIGTERM and self._parents.check():
            return LAUNCHER_GONE
        return signal.Signals(number).name if number else ""

    def _patience(self) -> float:
        """Seconds from a signal until this rank must be gone, at its present stage."""
        stage = self._progress.stage
        steps = PATIENCE_STEPS * self._progress.step_seconds if stage is Stage.TRAINING else 0.0
        return max(PATIENCE.get(stage, float("inf")), steps)

    def _describe_hang(self) -> str:
        if self.peers is None:
            return f"no progress for {self.idle:.0f} s at {self._progress.doing!r}, before the ranks knew each other"
        heartbeats = self.peers.heartbeats
        seconds = max([self.idle, *heartbeats.silence.values()])
        latest = heartbeats.latest | {self.peers.rank: self.peers.heartbeat()}
        return describe_hang(seconds, latest, self.stopped(), self.peers.peers)


def diagnose_lost(lost: Mapping[int, Heartbeat], peers: list[Peer]) -> Diagnosis:
    """The diagnosis from the last heartbeats of the ranks that have left: the one that left first, as far as can be told, is the cause."""
    first = min(lost.values(), key=lambda heartbeat: (CAUSES_FIRST.index(heartbeat.left), heartbeat.rank))
    peer = peers[first.rank]
    if first.left in (SIGNAL, HANG):
        return Diagnosis(first.code, first.left, first.why)
    if first.left:
        return Diagnosis(1, OTHERS, f"{peer} has left: {first.why}")
    return Diagnosis(1, OTHERS, f"{peer} is gone without a word, last seen {first.where}: it, or its host, was ended from outside")


def diagnose_error(
    error: BaseException,
    reason: str,
    lost: Callable[[], Mapping[int, Heartbeat]],
    vanished: Callable[[float], Mapping[int, Heartbeat]],
    peers: list[Peer],
) -> Diagnosis:
    """The cause of the main thread's exception: a signal (`reason` names it), another rank's end, or a fault of this rank.

    `lost` and `vanished` are PeerMonitor's: the ranks known to have left, and those of other machines without a heartbeat.
    """
    exits = isinstance(error, SystemExit)
    if exits or (isinstance(error, Exception) and FROM_ANOTHER_RANK.search(f"{type(error).__name__} {error}")):
        ends = time.monotonic() + (0.0 if exits else FIND_OUT_SECONDS)
        while not (gone := lost()) and time.monotonic() < ends:
            time.sleep(0.1)
        if gone := gone or (vanished(STOPPED_SECONDS) if not exits else {}):
            return diagnose_lost(gone, peers)
    if isinstance(error, SystemExit):
        return Diagnosis(error.code if isinstance(error.code, int) else 1, SIGNAL, reason or "asked to stop")
    return Diagnosis(1, FAULT, f"{type(error).__name__}: {error}".splitlines()[0][:300])


def describe_hang(seconds: float, heartbeats: Mapping[int, Heartbeat], silent: Collection[int], peers: list[Peer]) -> str:
    """Names the ranks that hold the others up: the silent ones, or else the odd ones out. `heartbeats`: the last of each rank."""
    head = f"no progress for {seconds:.0f} s"
    if silent:
        last_seen = []
        for rank in sorted(silent):
            if heartbeat := heartbeats.get(rank):
                last_seen.append(f"{peers[rank]} gave its last sign of life at {heartbeat.time} UTC, {heartbeat.where}")
            else:
                last_seen.append(f"{peers[rank]} has given no sign of life")
        return f"{head}: " + "; ".join(last_seen)
    if len(peers) == 1:
        return f"{head}: {heartbeats[0].where}"

    odd = odd_ones(heartbeats)
    places: dict[str, list[int]] = {}
    for rank in sorted(heartbeats):
        places.setdefault(heartbeats[rank].where, []).append(rank)
    groups = []
    for where, ranks in places.items():
        names = f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))
        groups.append(f"{names} {where}" + (" ← the odd one out" if odd & {*ranks} else ""))
    return f"{head}, though every rank is alive: " + "; ".join(groups)


def odd_ones(heartbeats: Mapping[int, Heartbeat]) -> set[int]:
    """Ranks that do something else than most: those in no collective while others wait in one, or else the rarest step and place."""
    computing = {rank for rank, heartbeat in heartbeats.items() if not heartbeat.waits}
    if computing and len(computing) < len(heartbeats):
        return computing
    places = Counter(heartbeat.where for heartbeat in heartbeats.values())
    rarest = min(places.values(), default=0)
    return {rank for rank, heartbeat in heartbeats.items() if places[heartbeat.where] == rarest and rarest < max(places.values())}
