"""When a rank must leave: counted by hand, look by look."""
# MERGED-DOC """Who is named, and for what: signs of life in, one sentence out."""

import signal
from types import SimpleNamespace

import pytest

from research.cluster.exit_codes import HUNG
from research.reliability.diagnosis import (
    ALONE_SECONDS,
    CLOSING_SECONDS,
    PATIENCE,
    STEPS_OF_PATIENCE,
    Judge,
    odd_ones,
    of_a_hang,
    of_an_error,
    of_the_lost,
)
from research.reliability.heartbeat import FAULT, HANG, OTHERS, SIGNAL, Heartbeat, Progress, Stage
from research.reliability.parents import LAUNCHER_GONE
from research.reliability.peers import Peer

HANG_SECONDS = 60.0


def judge(hang_seconds: float = HANG_SECONDS, gone: bool = False) -> tuple[Judge, Progress]:
    progress = Progress()
    return Judge(progress, SimpleNamespace(look=lambda: gone), hang_seconds), progress  # type: ignore[arg-type]


def looks(judge: Judge, limit: int = 1000) -> int:
    """How many looks of a second until there is a verdict; `limit` where there is none."""
    return next((number for number in range(1, limit) if judge.look(1.0)), limit)


def test_without_a_move_it_is_a_hang_after_hang_seconds() -> None:
    found, _ = judge()
    assert looks(found) == HANG_SECONDS + 1  # the first look sees the start
    assert found.look(1.0).code == HUNG


def test_a_move_begins_the_count_anew() -> None:
    found, progress = judge()
    for _ in range(5):
        assert all(found.look(1.0) is None for _ in range(int(HANG_SECONDS) - 1))
        progress.stepping(progress.step + 1)
    assert looks(found) == HANG_SECONDS + 1


@pytest.mark.parametrize("stage", [Stage.START, Stage.SAVING])
def test_work_of_any_length_is_no_hang_until_it_is_over(stage: Stage) -> None:
    found, progress = judge()
    with progress.work("saving", stage):
        assert looks(found) == 1000
    assert looks(found) == HANG_SECONDS + 1


def test_zero_is_off() -> None:
    assert looks(judge(hang_seconds=0.0)[0]) == 1000


@pytest.mark.parametrize(("stage", "patience"), PATIENCE.items())
def test_a_signal_that_leads_to_nothing_has_the_stages_patience(stage: Stage, patience: float) -> None:
    found, progress = judge(hang_seconds=0.0)
    progress.advance("something", stage)
    found.signal = signal.SIGUSR1
    assert looks(found) == patience
    verdict = found.look(1.0)
    assert verdict.code == 128 + signal.SIGUSR1 and verdict.why.startswith("SIGUSR1, but ")


def test_a_long_step_is_waited_for() -> None:
    found, progress = judge(hang_seconds=0.0)
    progress.stepping(1)
    progress.step_seconds = 100.0
    found.signal = signal.SIGTERM
    assert looks(found) == STEPS_OF_PATIENCE * 100


def test_a_checkpoint_is_waited_for_and_the_count_begins_after_it() -> None:
    found, progress = judge()
    found.signal = signal.SIGTERM
    with progress.work("saving", Stage.SAVING):
        assert looks(found) == 1000
    progress.advance("closing", Stage.LEAVING)
    assert looks(found) == PATIENCE[Stage.LEAVING]


@pytest.mark.parametrize(
    ("number", "gone", "reason"), [(15, True, LAUNCHER_GONE), (15, False, "SIGTERM"), (2, True, "SIGINT"), (0, True, "")]
)
def test_the_reason_tells_a_lost_launcher_from_a_wish(number: int, gone: bool, reason: str) -> None:
    assert judge(gone=gone)[0].reason_of(number) == reason


class Missed:
    """Others of whom rank 1 is silent, or gone."""

    def __init__(self, silence: float = 0.0, gone: bool = False) -> None:
        self.silence, self.gone = silence, gone

    def lost(self) -> dict:
        return {1: None} if self.gone else {}

    def silent(self, seconds: float) -> set[int]:
        return {1} if self.silence >= seconds else set()


def test_a_silent_rank_is_a_hang_even_in_work_of_any_length() -> None:
    found, progress = judge()
    with progress.work("saving", Stage.SAVING):
        found.others = Missed(silence=HANG_SECONDS - 1)
        assert looks(found) == 1000
        found.others = Missed(silence=HANG_SECONDS)
        assert looks(found) == 1


@pytest.mark.parametrize(("stage", "seconds"), [(Stage.TRAINING, ALONE_SECONDS), (Stage.LEAVING, CLOSING_SECONDS)])
def test_a_lost_rank_leaves_the_main_thread_a_moment(stage: Stage, seconds: float) -> None:
    found, progress = judge()
    progress.advance("something", stage)
    found.others = Missed(gone=True)
    found._of_the_lost = lambda: SimpleNamespace(code=1)  # type: ignore[method-assign]
    assert looks(found) == seconds


PEERS = [Peer(rank, "node7", "m", 4000 + rank, 0.0) for rank in range(4)]
ALL_REDUCE = [
    "research/training/loop.py:90 steps_of",
    "parallel/engines/engine.py:161 _mean",
    "…/site-packages/torch/distributed/distributed_c10d.py:2810 all_reduce",
]
ASLEEP = ["research/training/loop.py:90 steps_of", "experiments/a/variant.py:7 forward", "/usr/lib/python3.11/threading.py:327 wait"]


def sign(rank: int, stack: list[str] = ALL_REDUCE, step: int = 12, left: str = "", why: str = "", code: int = 0) -> Heartbeat:
    return Heartbeat(rank, 4000 + rank, 1, "12:03:44", "training", "step", step, stack, left, why, code)


def test_where_a_rank_is_names_the_function_and_our_own_line() -> None:
    assert sign(0).where == "in step 12, in all_reduce (called at parallel/engines/engine.py:161)"
    assert sign(0, ASLEEP).where == "in step 12, in wait (called at experiments/a/variant.py:7)"
    assert sign(0, ["research/training/loop.py:90 <lambda>"]).where == "in step 12, in <lambda> (research/training/loop.py:90)"
    assert sign(0, ["<frozen os>:225 makedirs"]).where == "in step 12, in makedirs (<frozen os>:225)"
    assert sign(0, []).where == "in step 12"


def test_a_silent_rank_is_named_with_its_process_and_its_last_place() -> None:
    said = of_a_hang(60.0, {0: sign(0), 1: sign(1, ASLEEP)}, {1}, PEERS[:2])
    assert said == (
        "no progress for 60 s: rank 1 (process 4001 on node7) gave its last sign of life at 12:03:44 UTC, "
        "in step 12, in wait (called at experiments/a/variant.py:7)"
    )
    assert of_a_hang(60.0, {0: sign(0)}, {1}, PEERS[:2]).endswith("rank 1 (process 4001 on node7) has given no sign of life")


def test_ranks_that_are_alive_are_told_by_place_and_the_odd_one_out_is_marked() -> None:
    said = of_a_hang(9.0, {rank: sign(rank, ASLEEP if rank == 2 else ALL_REDUCE) for rank in range(4)}, set(), PEERS)
    assert said == (
        "no progress for 9 s, though every rank is alive: "
        "ranks 0, 1, 3 in step 12, in all_reduce (called at parallel/engines/engine.py:161); "
        "rank 2 in step 12, in wait (called at experiments/a/variant.py:7) ← the odd one out"
    )


def test_one_rank_alone() -> None:
    assert of_a_hang(9.0, {0: sign(0, ASLEEP)}, set(), PEERS[:1]).startswith("no progress for 9 s: in step 12, in wait")


@pytest.mark.parametrize(
    ("signs", "odd"),
    [
        ([sign(0), sign(1, ASLEEP)], {1}),  # two ranks: the one in no collective
        ([sign(0), sign(1)], set()),
        ([sign(0), sign(1), sign(2, step=11)], {2}),  # all in a collective: the one in another step
        ([sign(0, ASLEEP), sign(1, ASLEEP), sign(2, ASLEEP, step=11)], {2}),
    ],
)
def test_odd_ones(signs: list[Heartbeat], odd: set[int]) -> None:
    assert odd_ones({sign.rank: sign for sign in signs}) == odd


KILLED, RAISED = sign(2), sign(1, left=FAULT, why="ValueError: no", code=1)
ASKED, FOLLOWED = sign(3, left=SIGNAL, why="SIGUSR1", code=138), sign(0, left=OTHERS, why="rank 2 …", code=1)
HUNG_RANK = sign(0, left=HANG, why="no progress for 60 s: …", code=124)


@pytest.mark.parametrize(
    ("lost", "code", "left", "why"),
    [
        ([FOLLOWED, ASKED, RAISED, KILLED], 1, OTHERS, "rank 2 (process 4002 on node7) is gone without a word, last seen in step 12, "),
        ([FOLLOWED, ASKED, RAISED], 1, OTHERS, "rank 1 (process 4001 on node7) has left: ValueError: no"),
        ([FOLLOWED, ASKED], 138, SIGNAL, "SIGUSR1"),
        ([FOLLOWED], 1, OTHERS, "rank 0 (process 4000 on node7) has left: rank 2 …"),
        ([HUNG_RANK, sign(1, left=OTHERS, why="", code=1)], 124, HANG, "no progress for 60 s: …"),
    ],
)
def test_of_several_that_have_left_the_cause_is_told(lost: list[Heartbeat], code: int, left: str, why: str) -> None:
    found = of_the_lost({sign.rank: sign for sign in lost}, PEERS)
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
    found = of_an_error(error, "SIGTERM", lambda: lost, PEERS)
    assert found.left == left and found.why.startswith(why) and "more" not in found.why


def test_a_closed_connection_waits_until_it_is_known_who_has_gone() -> None:
    answers = iter([{}, {}, {2: KILLED}])
    assert of_an_error(RuntimeError("NCCL error"), "", lambda: next(answers), PEERS).left == OTHERS
