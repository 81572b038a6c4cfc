"""The rendezvous: the ranks of a launch meet at one store and decide together, before torch.distributed is up and a model is built.

Rank 0, or torchrun's agent, serves the store. The ranks need no process group for this, so a rank with another layout, another number
of ranks or a mistake of its own is found and named instead of waited for. Values travel as JSON.
"""

import contextlib
import datetime
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from parallel.errors import Mistake, SharedMistake, listed
from research.cluster.environment import PORT_OPTION, Ranks, attempt, node_names, serves_store
from research.cluster.exit_codes import CRASHED, HUNG, PATIENCE, WRONG, sentence
from research.cluster.network import is_loopback, wait_until_listening

ANSWER = datetime.timedelta(seconds=60)
"""How long the store may take for one answer."""
SHORTEST_PAUSE, LONGEST_PAUSE = 0.01, 0.25
"""Seconds between two looks into the store."""
GRACE = 10.0
"""How much longer than rank 0 the other ranks wait: for its sentence about who is missing."""
READING_SECONDS, READING_SECONDS_IF_MISSING = 5.0, 1.0
"""How long a rank that serves the store stays, so that all ranks read why the launch ends: on one host, where a launcher ends ranks that
have not come yet, and after others have been waited for. With several hosts, PATIENCE."""
FAILED = "failed"
REPORT_SECONDS = 10.0
"""Rank 0 says after this time whom it waits for, and again whenever the time has doubled."""


class Rendezvous:
    """This rank's place at the store. Every method except `fail` is called by all ranks, in the same order."""

    def __init__(self, ranks: Ranks, store: Any, seconds: float, host: str = "", report: Callable[[str], object] = lambda text: None):
        """`store`: a torch.distributed Store. `seconds`: the longest wait for another rank. `report` shows rank 0 what is waited for."""
        import torch.distributed as dist

        self.ranks, self.seconds, self.host = ranks, seconds, host or socket.gethostname()
        self.whole_store, self._report = store, report
        self.store = dist.PrefixStore("rendezvous", store)
        self.reported = False
        """Whether this rank has said or read why the launch ends."""

    @classmethod
    def open(cls, ranks: Ranks, seconds: float, report: Callable[[str], object] = lambda text: None) -> "Rendezvous":
        """Connects to the store, and serves it where that is this rank's part. Imports torch."""
        serves, began = serves_store(ranks), time.monotonic()
        if not serves and (why := wait_until_listening(ranks, seconds)):
            reports = ranks.local_rank == 0 or ranks.rank == 1  # one for each host, where rank 0 may be the one that is missing
            raise SharedMistake(_no_store(ranks, seconds, why), reports, code=HUNG)
        import torch.distributed as dist

        timeout = datetime.timedelta(seconds=max(1.0, seconds - (time.monotonic() - began)))
        try:
            store = dist.TCPStore(ranks.master_addr, ranks.master_port, None, serves, timeout, wait_for_workers=False)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            taken = "is taken by another process" if "EADDRINUSE" in str(error) else f"cannot be used ({str(error).splitlines()[0][:160]})"
            option = PORT_OPTION.get(ranks.launcher, "--master_port N")
            address = f"{ranks.master_addr}:{ranks.master_port}"
            raise Mistake(f"the ranks cannot meet: {address} {taken} → add `{option}` with a free port to the launch command") from error
        store.set_timeout(ANSWER)
        return cls(ranks, dist.PrefixStore(f"attempt_{attempt()}", store), seconds, report=report)

    @classmethod
    def alone(cls, ranks: Ranks) -> "Rendezvous":
        """That of a world of one, which meets nobody."""
        import torch.distributed as dist

        return cls(ranks, dist.HashStore(), ANSWER.total_seconds())

    def arrive(self) -> None:
        """Says that this rank is there and has found no mistake so far. Two processes with one rank's number are a Mistake."""
        rank = self.ranks.rank
        if self.store.add(f"arrived/{rank}", 1) == 1:
            self._set(f"host/{rank}", [self.host, self.ranks.rank - self.ranks.local_rank])
        else:
            first = json.loads(self.store.get(f"host/{rank}"))[0]
            hosts = listed(dict.fromkeys([first, self.host]), "and")
            self.fail(
                f"two processes have come as rank {rank} of {self.ranks.world} (on {hosts}) → give each node a --node_rank of its own, "
                "and each launch a --master_port of its own"
            )

    def decide(self, name: str, own: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """What `decide`, which rank 0 calls, makes of the values of all ranks, in rank order; equal on every rank. Collective.

        `name` is used once. If a rank fails meanwhile, or does not come in time, every rank raises a SharedMistake.
        """
        self._set(f"{name}/{self.ranks.rank}", own)
        self.store.add(f"{name}/count", 1)
        if self.ranks.rank > 0:
            self._wait(lambda: self.store.check([f"{name}/decision"]), self.seconds + GRACE, self._no_answer)
            return json.loads(self.store.get(f"{name}/decision"))
        world = self.ranks.world
        self._wait(lambda: self.store.add(f"{name}/count", 0) >= world, self.seconds, lambda passed: self._missing(name, passed))
        decision = decide([json.loads(value) for value in self.store.multi_get([f"{name}/{rank}" for rank in range(world)])])
        self._set(f"{name}/decision", decision)
        return decision

    def refuse(self, name: str, own: Any, find_fault: Callable[[list[Any]], str | None]) -> None:
        """Every rank raises a SharedMistake if `find_fault`, which rank 0 calls with the values of all, finds one. Collective."""

        def decide(values: list[Any]) -> None:
            if fault := find_fault(values):
                self.fail(fault)

        self.decide(name, own, decide)

    def fail(self, text: str, code: int = WRONG, shows: bool = True) -> None:
        """Ends the launch: this rank reports `text`, the others read it; raises SharedMistake. One rank may call it by itself.

        If another rank has failed before, its sentence is the one that counts. `shows`: False if the sentence has been shown already.
        """
        self.reported = True
        if self.store.add(f"{FAILED}/first", 1) > 1:
            self._raise_failure()
        if shows:
            sys.stderr.write(f"error  {sentence(text)}\n")
            sys.stderr.flush()
        self._set(FAILED, [text, code, self.ranks.rank - self.ranks.local_rank])
        self._wait_until_read(code)
        raise SharedMistake(text, reports=False, code=code)

    @contextlib.contextmanager
    def sharing_errors(self) -> Iterator[None]:
        """An error of this rank inside ends all ranks, with a sentence that names it and its host. Calls of `decide` may be inside."""
        try:
            yield
        except SharedMistake as mistake:
            if not self.reported:
                self._wait_until_read(mistake.code)
            raise
        except Exception as error:
            is_mistake = isinstance(error, Mistake)
            text = str(error) if is_mistake else f"{type(error).__name__}: {error}"
            try:
                self.fail(_named(self.ranks, self.host, text), WRONG if is_mistake else CRASHED, shows=is_mistake)
            except RuntimeError:  # the store is gone: rank 0 has left
                raise error from None
            except SharedMistake:
                if is_mistake:
                    raise
            raise  # Python shows the traceback

    def failure(self) -> bool:
        """Whether a rank has failed."""
        return bool(self.store.check([FAILED]))

    def present(self) -> dict[int, tuple[str, int]]:
        """The ranks that have arrived: rank -> (host, first rank of its node)."""
        here = (rank for rank in range(self.ranks.world) if self.store.check([f"host/{rank}"]))
        return {rank: tuple(json.loads(self.store.get(f"host/{rank}"))) for rank in here}

    def _set(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def _wait(self, has_come: Callable[[], bool], seconds: float, too_late: Callable[[float], str]) -> None:
        """Waits until `has_come`; raises if a rank fails meanwhile, and after `seconds`, with the sentence that `too_late(seconds)` is."""
        begun, pause, reported = time.monotonic(), SHORTEST_PAUSE, REPORT_SECONDS
        try:
            while not has_come():
                if self.failure():
                    self._raise_failure()
                passed = time.monotonic() - begun
                if passed >= seconds:
                    self.fail(too_late(seconds), HUNG)
                if passed >= reported and self.ranks.rank == 0:
                    self._report(f"{too_late(round(passed)).partition(' → ')[0]}; they are waited for up to {seconds:g} s")
                    reported *= 2
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        except RuntimeError as error:  # torch's, of a store that has gone
            raise SharedMistake(f"rank 0 has left while the ranks met ({str(error).splitlines()[0][:160]})", False, CRASHED) from error

    def _raise_failure(self) -> None:
        self._wait_for_sentence()
        text, code, node = json.loads(self.store.get(FAILED))
        own_node = self.ranks.rank - self.ranks.local_rank
        with contextlib.suppress(RuntimeError):
            self.store.add(f"{FAILED}/read", 1)
        reports = self.ranks.launcher == "torchrun" and self.ranks.local_rank == 0 and own_node != node  # a terminal of its own
        raise SharedMistake(text, reports, code)

    def _wait_for_sentence(self) -> None:
        deadline = time.monotonic() + READING_SECONDS
        while not self.failure() and time.monotonic() < deadline:
            time.sleep(SHORTEST_PAUSE)

    def _wait_until_read(self, code: int) -> None:
        """If this rank serves the store: stays until every other rank has read the failure, or has had its time to come and read it."""
        if not serves_store(self.ranks):
            return
        one_host = self.ranks.world == self.ranks.local_world and self.ranks.launcher != "srun"
        deadline = time.monotonic() + (READING_SECONDS_IF_MISSING if code == HUNG else READING_SECONDS if one_host else PATIENCE)
        while self.store.add(f"{FAILED}/read", 0) < self.ranks.world - 1 and time.monotonic() < deadline:
            time.sleep(SHORTEST_PAUSE)

    def _missing(self, name: str, seconds: float) -> str:
        missing = [rank for rank in range(self.ranks.world) if not self.store.check([f"{name}/{rank}"])]
        return missing_sentence(missing, self.present(), node_names(self.ranks), self.ranks, seconds)

    def _no_answer(self, seconds: float) -> str:
        here = self.present()
        what = "is there but has not answered" if 0 in here else "has not come"
        return f"rank 0 {what} after {seconds:g} s, {len(here)} of {self.ranks.world} ranks are there → see what the host of rank 0 says"


def report_before_meeting(ranks: Ranks, mistake: Mistake, seconds: float, patience: float = PATIENCE) -> None:
    """Ends every rank because of a Mistake that this one has found before the ranks met. Returns if its own exit ends the others.

    The other ranks have most likely found the same one. So rank 0 reports at once. Any other rank waits for the store: with several
    hosts up to `seconds`, because that of rank 0 may start as much later, on one host for `patience`. There it waits until rank 0 has
    come without a Mistake, or for `patience`: then no launcher has ended it because of an error on rank 0, and it reports.
    """
    text = _named(ranks, socket.gethostname(), str(mistake))
    is_one_host = ranks.world == ranks.local_world and ranks.launcher != "srun"  # srun may leave the other ranks running
    if ranks.rank == 0:
        if is_one_host:
            return
        sys.stderr.write(f"error  {sentence(text)}\n")
        sys.stderr.flush()
    with contextlib.suppress(RuntimeError):  # the store cannot be made, or has gone
        rendezvous = _open_or_none(ranks, patience if is_one_host else seconds)
        deadline = time.monotonic() + patience
        if rendezvous and ranks.rank == 0:
            rendezvous.fail(text, shows=False)
        while rendezvous and not (rendezvous.failure() or rendezvous.store.check(["host/0"])) and time.monotonic() < deadline:
            time.sleep(LONGEST_PAUSE)
        if rendezvous:
            rendezvous.fail(text)
    raise SharedMistake(text, reports=ranks.rank > 0)


def _open_or_none(ranks: Ranks, seconds: float) -> Rendezvous | None:
    """The rendezvous; None if it cannot be reached, which is not what the user is to read."""
    try:
        return Rendezvous.open(ranks, seconds)
    except Mistake:
        return None


def _named(ranks: Ranks, host: str, text: str) -> str:
    """The sentence, headed by the rank and the host that it is true of; of a single host's rank 0, the sentence alone."""
    return text if ranks.rank == 0 and ranks.world == ranks.local_world else f"(rank {ranks.rank} on {host}) {text}"


def _no_store(ranks: Ranks, seconds: float, why: str) -> str:
    address = f"{ranks.master_addr}:{ranks.master_port}"
    text = f"rank {ranks.rank} on {socket.gethostname()} cannot reach rank 0 at {address} after {seconds:g} s ({why})"
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(ranks.master_addr, None, type=socket.SOCK_STREAM)[0][4][0]
        if ranks.world > ranks.local_world and ranks.rank >= ranks.local_world and is_loopback(str(found)):
            return f"{text}: {ranks.master_addr} is {found} here → give the address of the first host, as {_address_option(ranks)}"
    return f"{text} → see what rank 0's host says, and whether a firewall closes this port; watch.rendezvous_seconds is the limit"


def _address_option(ranks: Ranks) -> str:
    options = {"deepspeed": "--master_addr", "torchrun": "--rdzv_endpoint, and --local_addr on that host"}
    return options.get(ranks.launcher, "the variable MASTER_ADDR")


def missing_sentence(
    missing: Sequence[int], present: dict[int, tuple[str, int]], names: Sequence[str], ranks: Ranks, seconds: float
) -> str:
    """'ranks 2 and 3 of node b have not come after 60 s': `names` are the launcher's names of each rank's node, empty if it gives none."""
    nodes: dict[str, list[int]] = {}
    for rank in missing:
        first = rank - rank % max(1, ranks.local_world)
        host = names[rank] if names else next((host for host, node in present.values() if node == first), "")
        nodes.setdefault(f"node {host}" if host else f"node {first // max(1, ranks.local_world)} (counted from 0)", []).append(rank)
    groups = [f"{_ranks(numbers)} of {node}" for node, numbers in nodes.items()]
    here = listed(dict.fromkeys(host for host, _ in present.values()), "and") or "none"
    verb = "has" if len(missing) == 1 else "have"
    what = "answered" if {*missing} <= {*present} else "come"
    return (
        f"{listed(groups, 'and')} {verb} not {what} after {seconds:g} s, {len(present)} of {ranks.world} ranks are there (on {here}) → "
        "see what that node says, or raise watch.rendezvous_seconds"
    )


def _ranks(numbers: Sequence[int]) -> str:
    """'rank 3', 'ranks 2 and 3', 'ranks 8 … 15'."""
    if len(numbers) > 3 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"ranks {numbers[0]} … {numbers[-1]}"
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {listed(numbers, 'and')}"
