"""An error on one rank is an error on all: nobody is left waiting."""
# MERGED-DOC """Orders arrive as they were told, short or long, on every rank."""

import pytest

from parallel.errors import Mistake
from parallel.grid import Grid, make_grid
from parallel.object_collectives import HEAD, all_gather_objects, broadcast_ints, gather_objects, receive_ints, together
from tests.harness import run_ranks

SHORT = [[[7]], [[1], [], [2, 3]], [[-5, 2**40]], [[]]]
ORDERS = [*SHORT, [list(range(HEAD - 3))], [list(range(HEAD - 2))], [[9], list(range(5 * HEAD)), [4]]]


def exchanged(orders: list) -> list:
    """What this rank heard; rank 0 tells."""
    group = make_grid(1, 3).tensor_group
    assert group is not None
    if group.rank() > 0:
        return [receive_ints(group) for _ in orders]
    for order in orders:
        broadcast_ints(order, group)
    return orders


def test_orders_arrive_as_they_were_told():
    assert run_ranks(exchanged, 3, ORDERS) == [ORDERS] * 3


def told_by(errors: dict[int, Exception]) -> tuple[str, list[int], list[int]]:
    """What each rank heard where `errors` are raised; and that the ranks are still in step afterwards."""
    grid = make_grid(1, 1)
    heard = "nothing"
    try:
        with together(grid):
            if grid.rank in errors:
                raise errors[grid.rank]
    except Exception as error:
        heard = f"{type(error).__name__}: {error}"
    return heard, all_gather_objects(grid.rank * 10, grid), gather_objects(grid.rank, grid)


CASES = {
    "none": ({}, ["nothing", "nothing"]),
    "a mistake on rank 0": ({0: Mistake("a → b")}, ["Mistake: a → b", "Mistake: a → b"]),
    "a mistake on rank 1": ({1: Mistake("a → b")}, ["Mistake: a → b", "Mistake: a → b"]),
    "another error": ({1: KeyError("k")}, ["RuntimeError: rank 1 failed: KeyError: 'k'", "KeyError: 'k'"]),
    "one on each": ({0: Mistake("mine"), 1: OSError("other")}, ["Mistake: mine", "OSError: other"]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_one_rank_raises_all_ranks_raise(name: str) -> None:
    errors, expected = CASES[name]
    found = run_ranks(told_by, 2, errors)
    assert [heard for heard, _, _ in found] == expected
    assert [values for _, values, _ in found] == [[0, 10], [0, 10]] and [first for _, _, first in found] == [[0, 1], []]


def test_a_world_of_one_needs_no_process_group() -> None:
    with pytest.raises(KeyError), together(Grid()):
        raise KeyError("k")
    assert all_gather_objects("x", Grid()) == ["x"] and gather_objects("x", Grid()) == ["x"]
