"""Ranks that meet at a store: what they decide together, who is missing, and how one rank's error ends all."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from parallel.errors import Mistake, SharedMistake
from research.cluster.environment import Ranks
from research.cluster.exit_codes import CRASHED, HUNG, WRONG
from research.cluster.rendezvous import Rendezvous, missing_sentence, report_before_meeting
from tests.harness import run_ranks
from tests.research.helpers.launches import free_port

Body = Callable[[Rendezvous], Any]


def ranks_of(rank: int, world: int, launcher: Any = "deepspeed", port: int = 0) -> Ranks:
    """Two ranks on each host."""
    return Ranks(rank, rank % 2, world, 2, launcher, "127.0.0.1", port)


def met(world: int, body: Body, seconds: float = 20.0, absent: tuple[int, ...] = (), launcher: str = "deepspeed") -> list[Any]:
    """What `body` returns or raises on each rank: threads that share one store in memory. Hosts are a, b …"""
    store, found = dist.HashStore(), [None] * world

    def run(rank: int) -> None:
        rendezvous = Rendezvous(ranks_of(rank, world, launcher), store, seconds, host="abcd"[rank // 2])
        try:
            with rendezvous.sharing_errors():
                rendezvous.arrive()
                found[rank] = body(rendezvous)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world) if rank not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def said(found: list[Any], code: int = WRONG) -> str:
    """The one sentence with which every rank ends."""
    assert all(isinstance(error, SharedMistake) and error.code == code for error in found), found
    (sentence,) = {str(error) for error in found}
    return sentence


def test_rank_0_decides_from_the_values_of_all(capsys) -> None:
    def body(rendezvous: Rendezvous) -> Any:
        first = rendezvous.decide("sums", rendezvous.ranks.rank + 1, sum)
        return first, rendezvous.decide("names", rendezvous.host, list)

    assert met(4, body) == [(10, ["a", "a", "b", "b"])] * 4
    assert capsys.readouterr() == ("", "")


def test_a_fault_that_rank_0_finds_ends_all_and_is_shown_once(capsys) -> None:
    found = met(
        4, lambda rendezvous: rendezvous.refuse("numbers", rendezvous.ranks.rank, lambda values: f"3 is in {values} → leave it out")
    )
    assert said(found) == "3 is in [0, 1, 2, 3] → leave it out"
    assert not any(error.reports for error in found) and capsys.readouterr().err == "error  3 is in [0, 1, 2, 3] → leave it out\n"


@pytest.mark.parametrize(("error", "code"), [(Mistake("no text → write one"), WRONG), (KeyError("k"), CRASHED)])
def test_what_one_rank_raises_ends_all_at_once_and_names_the_rank_and_its_host(error: Exception, code: int, capsys) -> None:
    def body(rendezvous: Rendezvous) -> Any:
        if rendezvous.ranks.rank == 3:
            raise error
        return rendezvous.decide("never", None, list)

    began = time.monotonic()
    found = met(4, body, seconds=60.0)
    assert time.monotonic() - began < 30  # neither the 60 s for ranks that are missing, nor anybody's patience
    text = "no text → write one" if code == WRONG else "KeyError: 'k'"
    last = found.pop() if code == CRASHED else None  # its own traceback is shown
    assert last is None or last is error
    assert said(found, code) == f"(rank 3 on b) {text}"
    assert capsys.readouterr().err == (f"error  (rank 3 on b) {text}\n" if code == WRONG else "")


def test_of_ranks_that_fail_at_once_the_first_is_heard(capsys) -> None:
    together = threading.Barrier(3)

    def body(rendezvous: Rendezvous) -> Any:
        if rendezvous.ranks.rank == 0:
            return rendezvous.decide("never", None, list)
        together.wait(30)
        raise Mistake(f"{rendezvous.ranks.rank} → 0")

    sentence = said(met(4, body))
    assert sentence in {f"(rank {rank} on {host}) {rank} → 0" for rank, host in ((1, "a"), (2, "b"), (3, "b"))}
    assert capsys.readouterr().err == f"error  {sentence}\n"


def test_under_torchrun_every_other_host_has_a_terminal_in_which_it_is_said() -> None:
    def body(rendezvous: Rendezvous) -> Any:
        rendezvous.refuse("all", 0, lambda values: "a = 1 → use 2")

    assert [error.reports for error in met(6, body, launcher="torchrun")] == [False, False, True, False, True, False]


def test_missing_ranks_are_named(capsys) -> None:
    reports: list[str] = []
    found = met(4, lambda rendezvous: rendezvous.decide("all", 0, list), seconds=0.3, absent=(2, 3))
    expected = "ranks 2 and 3 of node 1 (counted from 0) have not come after 0.3 s, 2 of 4 ranks are there (on a) → "
    assert said(found[:2], HUNG).startswith(expected) and capsys.readouterr().err.startswith(f"error  {expected}") and not reports


def test_the_sentence_about_missing_ranks_knows_what_the_launcher_knows() -> None:
    present = {0: ("a", 0), 2: ("b", 2)}
    ranks = ranks_of(0, 8)
    named = missing_sentence([1, 3, 4, 5, 6, 7], present, [*"aabbccdd"], ranks, 60)
    assert named.startswith(
        "rank 1 of node a, rank 3 of node b, ranks 4 and 5 of node c and ranks 6 and 7 of node d have not come after 60 s"
    )
    unnamed = missing_sentence([3, 4, 5, 6, 7], present, [], ranks, 60)
    assert unnamed.startswith("rank 3 of node b, ranks 4 and 5 of node 2 (counted from 0) and ranks 6 and 7 of node 3")
    wide = missing_sentence([*range(8, 16)], {}, ["x"] * 16, Ranks(0, 0, 16, 8, "srun", "x", 1), 5)
    assert wide.startswith("ranks 8 … 15 of node x have not come after 5 s, 0 of 16 ranks are there (on none)")
    assert missing_sentence([2], present, [], ranks, 5).startswith("rank 2 of node b has not answered after 5 s")


def test_two_processes_with_one_number_are_refused(capsys) -> None:
    store, found = dist.HashStore(), []
    for host in "ab":
        rendezvous = Rendezvous(ranks_of(1, 2), store, 5.0, host=host)
        try:
            rendezvous.arrive()
        except SharedMistake as mistake:
            found.append(str(mistake))
    assert len(found) == 1 and found[0].startswith("two processes have come as rank 1 of 2 (on a and b) → give each node a --node_rank")


def over_tcp(port: int, fails: bool) -> Any:
    """Four real processes at one store that rank 0 serves; with `fails`, rank 2 never gets so far as to meet the others."""
    rank = dist.get_rank()
    ranks = ranks_of(rank, 4, port=port)
    if fails and rank == 2:
        try:
            report_before_meeting(ranks, Mistake("data.train = 'x' is missing → copy it"), seconds=20.0)
        except SharedMistake as mistake:
            return str(mistake), mistake.reports
    rendezvous = Rendezvous.open(ranks, 20.0)
    try:
        with rendezvous.sharing_errors():
            rendezvous.arrive()
            found = rendezvous.decide("sum", rank, sum)
            dist.barrier()  # the store ends with rank 0
            return found
    except SharedMistake as mistake:
        return str(mistake), mistake.reports


@pytest.mark.parametrize("fails", [pytest.param(False, marks=pytest.mark.slow), True])
def test_real_processes_meet_at_a_store_over_tcp(fails: bool) -> None:
    found = run_ranks(over_tcp, 4, free_port(), fails)
    assert len({str(value) for value in found}) == 1
    if not fails:
        assert found == [6] * 4
    else:
        sentence, reports = found[0]
        assert sentence.startswith("(rank 2 on ") and sentence.endswith(") data.train = 'x' is missing → copy it") and not reports


def late_host(port: int) -> tuple[str, bool]:
    """Two hosts. That of rank 1 has a mistake of its own, and is there long before the store, which comes with rank 0."""
    rank = dist.get_rank()
    ranks = Ranks(rank, 0, 2, 1, "deepspeed", "127.0.0.1", port)
    try:
        if rank == 1:
            report_before_meeting(ranks, Mistake("data.train = 'x' is missing → copy it"), seconds=30.0, patience=0.1)
        time.sleep(0.5)
        rendezvous = Rendezvous.open(ranks, 30.0)
        with rendezvous.sharing_errors():
            rendezvous.arrive()
            rendezvous.decide("never", None, list)
    except SharedMistake as mistake:
        return str(mistake), mistake.reports
    raise AssertionError("nobody has said anything")


def test_a_mistake_of_one_host_waits_for_the_host_of_rank_0_that_starts_later() -> None:
    """The patience with rank 0 counts from the moment at which the store is there: it is the launch's limit that counts until then."""
    found = run_ranks(late_host, 2, free_port())
    sentence, reports = found[0]
    assert sentence.startswith("(rank 1 on ") and sentence.endswith(") data.train = 'x' is missing → copy it")
    assert found == [(sentence, False)] * 2 and not reports
