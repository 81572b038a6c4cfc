"""An error on one rank is raised on all ranks, and lists of integers arrive as they were sent, whatever their length."""

import socket

import pytest

from parallel.errors import Mistake, SharedMistake
from parallel.grid import Grid, make_grid
from parallel.object_collectives import HEAD, all_gather_objects, broadcast_ints, gather_objects, receive_ints, together
from tests.harness import run_ranks

HOST = socket.gethostname()
SHORT = [[[7]], [[1], [], [2, 3]], [[-5, 2**40]], [[]]]
MESSAGES = [*SHORT, [list(range(HEAD - 3))], [list(range(HEAD - 2))], [[9], list(range(5 * HEAD)), [4]]]


def exchanged(messages: list) -> list:
    """The messages as this rank received them; rank 0 sends."""
    group = make_grid(1, 3).tensor_group
    assert group is not None
    if group.rank() > 0:
        return [receive_ints(group) for _ in messages]
    for message in messages:
        broadcast_ints(message, group)
    return messages


def test_lists_of_integers_arrive_as_they_were_sent():
    assert run_ranks(exchanged, 3, MESSAGES) == [MESSAGES] * 3


def raised_by(errors: dict[int, Exception]) -> tuple[str, list[int], list[int]]:
    """The error that each rank raises if `errors` are raised in the block; and that collectives still match afterwards."""
    grid = make_grid(1, 1)
    heard = "nothing"
    try:
        with together(grid):
            if grid.rank in errors:
                raise errors[grid.rank]
    except Exception as error:
        heard = f"{type(error).__name__}{', reported' if isinstance(error, SharedMistake) and error.reports else ''}: {error}"
    return heard, all_gather_objects(grid.rank * 10, grid), gather_objects(grid.rank, grid)


CASES = {
    "none": ({}, ["nothing", "nothing"]),
    "a mistake on rank 0": ({0: Mistake("a → b")}, ["SharedMistake, reported: a → b", "SharedMistake: a → b"]),
    "a mistake on rank 1": (
        {1: Mistake("a → b")},
        [f"SharedMistake, reported: (rank 1 on {HOST}) a → b", f"SharedMistake: (rank 1 on {HOST}) a → b"],
    ),
    "another error": ({1: KeyError("k")}, [f"RuntimeError: rank 1 on {HOST} failed: KeyError: 'k'", "KeyError: 'k'"]),
    "one on each": ({0: Mistake("mine"), 1: OSError("other")}, ["SharedMistake, reported: mine", "SharedMistake: mine"]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_one_rank_raises_all_ranks_raise(name: str) -> None:
    errors, expected = CASES[name]
    found = run_ranks(raised_by, 2, errors)
    assert [heard for heard, _, _ in found] == expected
    assert [values for _, values, _ in found] == [[0, 10], [0, 10]] and [first for _, _, first in found] == [[0, 1], []]


def test_a_world_of_one_needs_no_process_group() -> None:
    with pytest.raises(KeyError), together(Grid()):
        raise KeyError("k")
    assert all_gather_objects("x", Grid()) == ["x"] and gather_objects("x", Grid()) == ["x"]
