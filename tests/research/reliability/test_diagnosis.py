"""When a rank must leave, counted check by check, and which rank is named for what: heartbeats in, one sentence out."""

import signal
from types import SimpleNamespace

import pytest

from parallel.process_identity import ProcessIdentity
from research.cluster.exit_codes import HUNG
from research.reliability import diagnosis
from research.reliability.diagnosis import (
    CLOSING_SECONDS,
    LOST_PEER_SECONDS,
    PATIENCE,
    PATIENCE_STEPS,
    STOPPED_SECONDS,
    Diagnoser,
    describe_hang,
    diagnose_error,
    diagnose_lost,
    odd_ones,
)
from research.reliability.heartbeat import FAULT, HANG, OTHERS, SIGNAL, Heartbeat, Progress, Stage
from research.reliability.parents import LAUNCHER_GONE
from research.reliability.peers import Peer

HANG_SECONDS = 60.0
PEERS = [Peer(rank, ProcessIdentity("node7", 4000 + rank, "boot", "namespace", 0.0)) for rank in range(4)]


def diagnoser(hang_seconds: float = HANG_SECONDS, gone: bool = False) -> tuple[Diagnoser, Progress]:
    progress = Progress()
    return Diagnoser(progress, SimpleNamespace(check=lambda: gone), hang_seconds), progress  # type: ignore[arg-type]


def checks(diagnoser: Diagnoser, limit: int = 1000) -> int:
    """How many checks, one per second, until there is a diagnosis; `limit` if there is none."""
    return next((number for number in range(1, limit) if diagnoser.check(1.0)), limit)


def test_without_a_move_it_is_a_hang_after_hang_seconds() -> None:
    rank, _ = diagnoser()
    assert checks(rank) == HANG_SECONDS + 1  # the first check sees the start
    assert rank.check(1.0).code == HUNG


def test_a_move_begins_the_count_anew() -> None:
    rank, progress = diagnoser()
    for _ in range(5):
        assert all(rank.check(1.0) is None for _ in range(int(HANG_SECONDS) - 1))
        progress.stepping(progress.step + 1)
    assert checks(rank) == HANG_SECONDS + 1


@pytest.mark.parametrize("stage", [Stage.START, Stage.SAVING])
def test_work_of_any_length_is_no_hang_until_it_is_over(stage: Stage) -> None:
    rank, progress = diagnoser()
    with progress.work("saving", stage):
        assert checks(rank) == 1000
    assert checks(rank) == HANG_SECONDS + 1


def test_until_the_first_step_is_done_the_limit_is_that_of_the_start() -> None:
    """Imports, building the engine and a first step take as long as they take, however short hang_seconds is."""
    progress = Progress()
    rank = Diagnoser(progress, SimpleNamespace(check=lambda: False), 2.0, start_seconds=30.0)  # type: ignore[arg-type]
    progress.advance("building the engine")
    assert checks(rank) == 31
    progress.stepping(1)
    assert checks(rank) == 31
    progress.stepping(2)
    assert checks(rank) == 3
    longer = Diagnoser(Progress(), SimpleNamespace(check=lambda: False), HANG_SECONDS, start_seconds=30.0)  # type: ignore[arg-type]
    assert checks(longer) == HANG_SECONDS + 1
    off = Diagnoser(Progress(), SimpleNamespace(check=lambda: False), 0.0, start_seconds=30.0)  # type: ignore[arg-type]
    assert checks(off) == 1000


def test_zero_is_off() -> None:
    assert checks(diagnoser(hang_seconds=0.0)[0]) == 1000


@pytest.mark.parametrize(("stage", "patience"), PATIENCE.items())
def test_a_signal_that_leads_to_nothing_has_the_stages_patience(stage: Stage, patience: float) -> None:
    rank, progress = diagnoser(hang_seconds=0.0)
    progress.advance("something", stage)
    rank.signal = signal.SIGUSR1
    assert checks(rank) == patience
    diagnosis = rank.check(1.0)
    assert diagnosis.code == 128 + signal.SIGUSR1 and diagnosis.why.startswith("SIGUSR1, but ")


def test_a_long_step_is_waited_for() -> None:
    rank, progress = diagnoser(hang_seconds=0.0)
    progress.stepping(1)
    progress.step_seconds = 100.0
    rank.signal = signal.SIGTERM
    assert checks(rank) == PATIENCE_STEPS * 100


def test_a_checkpoint_is_waited_for_and_the_count_begins_after_it() -> None:
    rank, progress = diagnoser()
    rank.signal = signal.SIGTERM
    with progress.work("saving", Stage.SAVING):
        assert checks(rank) == 1000
    progress.advance("closing", Stage.LEAVING)
    assert checks(rank) == PATIENCE[Stage.LEAVING]


@pytest.mark.parametrize(
    ("number", "gone", "reason"), [(15, True, LAUNCHER_GONE), (15, False, "SIGTERM"), (2, True, "SIGINT"), (0, True, "")]
)
def test_the_reason_tells_a_lost_launcher_from_a_wish(number: int, gone: bool, reason: str) -> None:
    assert diagnoser(gone=gone)[0].reason_of(number) == reason


class Missed:
    """A PeerMonitor of rank 0, for which rank 1 is silent or gone."""

    rank, peers, heartbeats = 0, PEERS, SimpleNamespace(silence={}, latest={})

    def __init__(self, silence: float = 0.0, gone: bool = False) -> None:
        self.silence, self.gone = silence, gone

    def lost(self) -> dict:
        return {1: heartbeat(1)} if self.gone else {}

    def silent(self, seconds: float) -> set[int]:
        return {1} if self.silence >= seconds else set()

    def heartbeat(self) -> Heartbeat:
        return heartbeat(0)


def test_a_silent_rank_is_a_hang_even_in_work_of_any_length() -> None:
    rank, progress = diagnoser()
    with progress.work("saving", Stage.SAVING):
        rank.peers = Missed(silence=HANG_SECONDS - 1)
        assert checks(rank) == 1000
        rank.peers = Missed(silence=HANG_SECONDS)
        assert checks(rank) == 1
        assert rank.check(1.0).why.endswith("rank 1 (process 4001 on node7) has given no sign of life")


def test_a_hang_is_not_told_before_one_can_tell_which_rank_is_stopped() -> None:
    """Otherwise the rank that stands still would be left behind: on a busy machine heartbeats are read late."""
    rank, _ = diagnoser()
    rank.peers = Missed()
    rank.peers.heartbeats = SimpleNamespace(silence={}, latest={}, watched=STOPPED_SECONDS)
    assert checks(rank) == 1000
    rank.peers.heartbeats.watched = STOPPED_SECONDS + 1
    assert rank.check(1.0).why.startswith("no progress for ")


@pytest.mark.parametrize(("stage", "seconds"), [(Stage.TRAINING, LOST_PEER_SECONDS), (Stage.LEAVING, CLOSING_SECONDS)])
def test_a_lost_rank_leaves_the_main_thread_a_moment(stage: Stage, seconds: float) -> None:
    rank, progress = diagnoser()
    progress.advance("something", stage)
    rank.peers = Missed(gone=True)
    assert checks(rank) == seconds
    assert rank.check(1.0).why.startswith("rank 1 (process 4001 on node7) is gone without a word")


ALL_REDUCE = [
    "research/training/loop.py:90 steps_of",
    "parallel/engines/engine.py:161 _mean",
    "…/site-packages/torch/distributed/distributed_c10d.py:2810 all_reduce",
]
ASLEEP = ["research/training/loop.py:90 steps_of", "experiments/a/variant.py:7 forward", "/usr/lib/python3.11/threading.py:327 wait"]


def heartbeat(rank: int, stack: list[str] = ALL_REDUCE, step: int = 12, left: str = "", why: str = "", code: int = 0) -> Heartbeat:
    return Heartbeat(rank, 4000 + rank, 1, "12:03:44", "training", "step", step, stack, left, why, code)


def test_where_a_rank_is_names_the_function_and_our_own_line() -> None:
    assert heartbeat(0).where == "in step 12, in all_reduce (called at parallel/engines/engine.py:161)"
    assert heartbeat(0, ASLEEP).where == "in step 12, in wait (called at experiments/a/variant.py:7)"
    assert heartbeat(0, ["research/training/loop.py:90 <lambda>"]).where == "in step 12, in <lambda> (research/training/loop.py:90)"
    assert heartbeat(0, ["<frozen os>:225 makedirs"]).where == "in step 12, in makedirs (<frozen os>:225)"
    assert heartbeat(0, []).where == "in step 12"


def test_a_silent_rank_is_named_with_its_process_and_its_last_place() -> None:
    said = describe_hang(60.0, {0: heartbeat(0), 1: heartbeat(1, ASLEEP)}, {1}, PEERS[:2])
    assert said == (
        "no progress for 60 s: rank 1 (process 4001 on node7) gave its last sign of life at 12:03:44 UTC, "
        "in step 12, in wait (called at experiments/a/variant.py:7)"
    )
    assert describe_hang(60.0, {0: heartbeat(0)}, {1}, PEERS[:2]).endswith("rank 1 (process 4001 on node7) has given no sign of life")


def test_ranks_that_are_alive_are_told_by_place_and_the_odd_one_out_is_marked() -> None:
    said = describe_hang(9.0, {rank: heartbeat(rank, ASLEEP if rank == 2 else ALL_REDUCE) for rank in range(4)}, set(), PEERS)
    assert said == (
        "no progress for 9 s, though every rank is alive: "
        "ranks 0, 1, 3 in step 12, in all_reduce (called at parallel/engines/engine.py:161); "
        "rank 2 in step 12, in wait (called at experiments/a/variant.py:7) ← the odd one out"
    )


def test_one_rank_alone() -> None:
    assert describe_hang(9.0, {0: heartbeat(0, ASLEEP)}, set(), PEERS[:1]).startswith("no progress for 9 s: in step 12, in wait")


@pytest.mark.parametrize(
    ("heartbeats", "odd"),
    [
        ([heartbeat(0), heartbeat(1, ASLEEP)], {1}),  # two ranks: the one in no collective
        ([heartbeat(0), heartbeat(1)], set()),
        ([heartbeat(0), heartbeat(1), heartbeat(2, step=11)], {2}),  # all in a collective: the one in another step
        ([heartbeat(0, ASLEEP), heartbeat(1, ASLEEP), heartbeat(2, ASLEEP, step=11)], {2}),
    ],
)
def test_odd_ones(heartbeats: list[Heartbeat], odd: set[int]) -> None:
    assert odd_ones({each.rank: each for each in heartbeats}) == odd


KILLED, RAISED = heartbeat(2), heartbeat(1, left=FAULT, why="ValueError: no", code=1)
ASKED, FOLLOWED = heartbeat(3, left=SIGNAL, why="SIGUSR1", code=138), heartbeat(0, left=OTHERS, why="rank 2 …", code=1)
HUNG_RANK = heartbeat(0, left=HANG, why="no progress for 60 s: …", code=124)


@pytest.mark.parametrize(
    ("lost", "code", "left", "why"),
    [
        ([FOLLOWED, ASKED, RAISED, KILLED], 1, OTHERS, "rank 2 (process 4002 on node7) is gone without a word, last seen in step 12, "),
        ([FOLLOWED, ASKED, RAISED], 1, OTHERS, "rank 1 (process 4001 on node7) has left: ValueError: no"),
        ([FOLLOWED, ASKED], 138, SIGNAL, "SIGUSR1"),
        ([FOLLOWED], 1, OTHERS, "rank 0 (process 4000 on node7) has left: rank 2 …"),
        ([HUNG_RANK, heartbeat(1, left=OTHERS, why="", code=1)], 124, HANG, "no progress for 60 s: …"),
    ],
)
def test_of_several_that_have_left_the_cause_is_told(lost: list[Heartbeat], code: int, left: str, why: str) -> None:
    found = diagnose_lost({each.rank: each for each in lost}, PEERS)
    assert (found.code, found.left) == (code, left) and found.why.startswith(why)


@pytest.mark.parametrize(
    ("error", "lost", "left", "why"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), {2: KILLED}, OTHERS, "rank 2 ("),
        (ValueError("no such head\nmore"), {2: KILLED}, FAULT, "ValueError: no such head"),  # its own fault, whoever else is gone
        (SystemExit(143), {}, SIGNAL, "SIGTERM"),
        (SystemExit(143), {2: KILLED}, OTHERS, "rank 2 ("),  # a launcher asks the others when one was killed
    ],
)
def test_what_an_exception_is_about(error: BaseException, lost: dict, left: str, why: str) -> None:
    found = diagnose_error(error, "SIGTERM", lambda: lost, lambda seconds: {}, PEERS)
    assert found.left == left and found.why.startswith(why) and "more" not in found.why


def test_a_closed_connection_waits_until_it_is_known_who_has_gone() -> None:
    answers = iter([{}, {}, {2: KILLED}])
    assert diagnose_error(RuntimeError("NCCL error"), "", lambda: next(answers), lambda seconds: {}, PEERS).left == OTHERS


def test_a_closed_connection_to_a_host_that_gives_no_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of another machine can be seen: its rank has gone if its heartbeat stands still. Of an exit nothing is waited for."""
    monkeypatch.setattr(diagnosis, "FIND_OUT_SECONDS", 0.0)
    watched: list[float] = []

    def vanished(seconds: float) -> dict[int, Heartbeat]:
        watched.append(seconds)
        return {2: KILLED}

    found = diagnose_error(RuntimeError("Connection closed by peer"), "", dict, vanished, PEERS)
    assert found.left == OTHERS and found.why.startswith("rank 2 (process 4002 on node7) is gone without a word")
    assert diagnose_error(SystemExit(143), "SIGTERM", dict, vanished, PEERS).left == SIGNAL and watched == [STOPPED_SECONDS]
    assert diagnose_error(ValueError("no such head"), "", dict, vanished, PEERS).left == FAULT and len(watched) == 1
