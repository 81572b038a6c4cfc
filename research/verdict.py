"""Who is to blame when a run cannot go on, read off the ranks' signs of life: sentences, and no process is touched."""

import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from research.peers import Peer
from research.sign_of_life import FAULT, HANG, OTHERS, SIGNAL, Sign

OF_OTHERS = re.compile(r"\bgloo\b|nccl|connection (closed|reset|refused)|broken pipe|TCPStore|Dist(Backend|Network|Store)Error", re.I)
"""In an exception of torch's that may come from another rank's end."""
FIND_OUT_SECONDS = 5.0
"""How long after such an exception another rank's end may become known."""

ORDER = ("", FAULT, SIGNAL, HANG, OTHERS)
"""Causes first: a rank that was killed has left no word; one that left because of others comes last."""


@dataclass(frozen=True)
class Verdict:
    """Why this rank leaves, and with which exit code."""

    code: int
    left: str
    """research.sign_of_life.LEFT."""
    why: str


def of_the_lost(lost: Mapping[int, Sign], peers: list[Peer]) -> Verdict:
    """What became of the ranks that have left (their last signs): the one that left first, as far as that can be told, is the cause."""
    sign = min(lost.values(), key=lambda sign: (ORDER.index(sign.left), sign.rank))
    if sign.left in (SIGNAL, HANG):
        return Verdict(sign.code, sign.left, sign.why)
    who = peers[sign.rank]
    if sign.left:
        return Verdict(1, OTHERS, f"{who} has left: {sign.why}")
    return Verdict(1, OTHERS, f"{who} is gone without a word, last seen {sign.where}: killed from outside or for want of memory")


def of_an_error(error: BaseException, reason: str, lost: Callable[[], Mapping[int, Sign]], peers: list[Peer]) -> Verdict:
    """What the main thread's exception is about: a signal (`reason` names it), another rank's end, or this one's own fault."""
    asked = isinstance(error, SystemExit)
    if asked or (isinstance(error, Exception) and OF_OTHERS.search(f"{type(error).__name__} {error}")):
        ends = time.monotonic() + (0.0 if asked else FIND_OUT_SECONDS)
        while not (found := lost()) and time.monotonic() < ends:
            time.sleep(0.1)
        if found:
            return of_the_lost(found, peers)
    if isinstance(error, SystemExit):
        return Verdict(error.code if isinstance(error.code, int) else 1, SIGNAL, reason or "asked to stop")
    return Verdict(1, FAULT, f"{type(error).__name__}: {error}".splitlines()[0][:300])


def of_a_hang(seconds: float, signs: Mapping[int, Sign], silent: Collection[int], peers: list[Peer]) -> str:
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


def odd_ones(signs: Mapping[int, Sign]) -> set[int]:
    """Ranks that do something else than most: those in no collective where others wait in one, or else the rarest step and place."""
    apart = {rank for rank, sign in signs.items() if not sign.waits}
    if apart and len(apart) < len(signs):
        return apart
    places = Counter(sign.where for sign in signs.values())
    rarest = min(places.values(), default=0)
    return {rank for rank, sign in signs.items() if places[sign.where] == rarest and rarest < max(places.values())}


def _silent(peer: Peer, sign: Sign | None) -> str:
    return f"{peer} gave its last sign of life at {sign.time} UTC, {sign.where}" if sign else f"{peer} has given no sign of life"


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))
