"""Decides when a rank must leave: it was asked to and cannot, another rank is gone, nothing moves any more.

Time is counted in looks, never read off a clock: a job that was suspended (Ctrl-Z, a laptop's lid) has not waited for anything.
"""
# MERGED-DOC """Who is to blame when a run cannot go on, read off the ranks' signs of life: sentences, and no process is touched."""

import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from research.cluster.exit_codes import HUNG, SIGNALLED
from research.reliability.heartbeat import FAULT, HANG, OTHERS, SIGNAL, Heartbeat, Progress, Stage
from research.reliability.parents import LAUNCHER_GONE, Parents
from research.reliability.peers import NoPeers, Peer, PeerMonitor, Peers

OF_OTHERS = re.compile(r"\bgloo\b|nccl|connection (closed|reset|refused)|broken pipe|TCPStore|Dist(Backend|Network|Store)Error", re.I)
"""In an exception of torch's that may come from another rank's end."""
FIND_OUT_SECONDS = 5.0
"""How long after such an exception another rank's end may become known."""

ORDER = ("", FAULT, SIGNAL, HANG, OTHERS)
"""Causes first: a rank that was killed has left no word; one that left because of others comes last."""


@dataclass(frozen=True)
class Diagnosis:
    """Why this rank leaves, and with which exit code."""

    code: int
    left: str
    """research.sign_of_life.LEFT."""
    why: str


def of_the_lost(lost: Mapping[int, Heartbeat], peers: list[Peer]) -> Diagnosis:
    """What became of the ranks that have left (their last signs): the one that left first, as far as that can be told, is the cause."""
    sign = min(lost.values(), key=lambda sign: (ORDER.index(sign.left), sign.rank))
    if sign.left in (SIGNAL, HANG):
        return Diagnosis(sign.code, sign.left, sign.why)
    who = peers[sign.rank]
    if sign.left:
        return Diagnosis(1, OTHERS, f"{who} has left: {sign.why}")
    return Diagnosis(1, OTHERS, f"{who} is gone without a word, last seen {sign.where}: killed from outside or for want of memory")


def of_an_error(error: BaseException, reason: str, lost: Callable[[], Mapping[int, Heartbeat]], peers: list[Peer]) -> Diagnosis:
    """What the main thread's exception is about: a signal (`reason` names it), another rank's end, or this one's own fault."""
    asked = isinstance(error, SystemExit)
    if asked or (isinstance(error, Exception) and OF_OTHERS.search(f"{type(error).__name__} {error}")):
        ends = time.monotonic() + (0.0 if asked else FIND_OUT_SECONDS)
        while not (found := lost()) and time.monotonic() < ends:
            time.sleep(0.1)
        if found:
            return of_the_lost(found, peers)
    if isinstance(error, SystemExit):
        return Diagnosis(error.code if isinstance(error.code, int) else 1, SIGNAL, reason or "asked to stop")
    return Diagnosis(1, FAULT, f"{type(error).__name__}: {error}".splitlines()[0][:300])


def of_a_hang(seconds: float, signs: Mapping[int, Heartbeat], silent: Collection[int], peers: list[Peer]) -> str:
    """Who holds everybody up: the ranks that give no sign of life any more, or else the odd ones out. `signs`: the last of each rank."""
    head = f"no progress for {seconds:.0f} s"
    if silent:
        return f"{head}: " + "; ".join(_silent(peers[rank], signs.get(rank)) for rank in sorted(silent))
    if len(peers) == 1:
        return f"{head}: {signs[0].where}"
    odd = odd_ones(signs)
    places: dict[str, list[int]] = {}
    for rank in sorted(signs):
        places.setdefault(signs[rank].where, []).append(rank)
    said = [f"{_ranks(ranks)} {where}" + (" ← the odd one out" if odd & {*ranks} else "") for where, ranks in places.items()]
    return f"{head}, though every rank is alive: " + "; ".join(said)


def odd_ones(signs: Mapping[int, Heartbeat]) -> set[int]:
    """Ranks that do something else than most: those in no collective where others wait in one, or else the rarest step and place."""
    apart = {rank for rank, sign in signs.items() if not sign.waits}
    if apart and len(apart) < len(signs):
        return apart
    places = Counter(sign.where for sign in signs.values())
    rarest = min(places.values(), default=0)
    return {rank for rank, sign in signs.items() if places[sign.where] == rarest and rarest < max(places.values())}


def _silent(peer: Peer, sign: Heartbeat | None) -> str:
    return f"{peer} gave its last sign of life at {sign.time} UTC, {sign.where}" if sign else f"{peer} has given no sign of life"


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))


PATIENCE = {Stage.START: 5.0, Stage.TRAINING: 20.0, Stage.LEAVING: 15.0}
"""Seconds from a signal until the main thread must have done what is asked; a checkpoint may take as long as it takes."""
STEPS_OF_PATIENCE = 3
"""A step that is long by nature is not cut off: patience is at least so many times the last one."""
ALONE_SECONDS, CLOSING_SECONDS = 5.0, 10.0
"""Left to the main thread to find out by itself that another rank is gone (gloo raises, NCCL waits), and then to close its files."""
SILENT_SECONDS = 8.0
"""Without a sign of life for so long, another rank is taken for stopped where this one cannot end."""


class Judge:
    """Counts what has passed from look to look. The watching thread's own; `others` is replaced once the ranks have met."""

    def __init__(self, progress: Progress, parents: Parents, hang_seconds: float) -> None:
        """`hang_seconds` without progress are a hang; 0: none is."""
        self.others: Peers = NoPeers()
        self.signal = 0
        """The first signal that has come; 0: none."""
        self.idle = 0.0
        self._progress, self._parents, self._hang_seconds = progress, parents, hang_seconds
        self._moves, self._asked, self._alone = -1, 0.0, 0.0

    def reason_of(self, number: int) -> str:
        """Why the run was asked to stop with this signal; '' where it was with none (0)."""
        if number == signal.SIGTERM and self._parents.look():
            return LAUNCHER_GONE
        return signal.Signals(number).name if number else ""

    @property
    def uneasy(self) -> bool:
        """Whether it is time to listen closely to the others."""
        return bool(self.signal or (self._hang_seconds and self.idle >= self._hang_seconds / 10))

    def look(self, seconds: float) -> Diagnosis | None:
        """One look, `seconds` after the last; a verdict where this rank must leave."""
        self._count(seconds)
        if self._alone >= (CLOSING_SECONDS if self._progress.stage is Stage.LEAVING else ALONE_SECONDS):
            return self._of_the_lost()
        if self.signal and self._asked >= self.patience():
            return Diagnosis(SIGNALLED + self.signal, SIGNAL, f"{self.reason_of(self.signal)}, but {self._stuck()}")
        if self._hang_seconds and self._hangs():
            return Diagnosis(HUNG, HANG, self._stuck())
        return None

    def _count(self, seconds: float) -> None:
        moves = self._progress.moves
        self.idle = self.idle + seconds if moves == self._moves else 0.0
        self._moves = moves
        saving = self._progress.stage is Stage.SAVING
        self._asked = self._asked + seconds if self.signal and not saving else 0.0
        self._alone = self._alone + seconds if self.others.lost() else 0.0

    def patience(self) -> float:
        """Seconds from a signal until this rank must be gone, as things are."""
        stage = self._progress.stage
        steps = STEPS_OF_PATIENCE * self._progress.step_seconds if stage is Stage.TRAINING else 0.0
        return max(PATIENCE.get(stage, float("inf")), steps)

    def _hangs(self) -> bool:
        """Nothing has moved here; or another rank has given no sign of life, while this one waits for work of any length."""
        return (self.idle >= self._hang_seconds and not self._progress.busy) or bool(self.others.silent(self._hang_seconds))

    def stopped(self) -> set[int]:
        """Other ranks that are taken for stopped, now that this one has to leave."""
        return self.others.silent(min(SILENT_SECONDS, self._hang_seconds / 2 or SILENT_SECONDS))

    def _of_the_lost(self) -> Diagnosis:
        assert isinstance(self.others, PeerMonitor)
        return of_the_lost(self.others.lost(), self.others.peers)

    def _stuck(self) -> str:
        """Where this rank, and who else, has got stuck."""
        if not isinstance(self.others, PeerMonitor):
            return f"no progress for {self.idle:.0f} s while the ranks meet: one of them is missing"
        signs = self.others.signs
        seconds = max([self.idle, *signs.silence.values()])
        return of_a_hang(seconds, signs.heard | {self.others.rank: self.others.own()}, self.stopped(), self.others.peers)
