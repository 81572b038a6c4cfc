"""An error on one rank is an error on all: nobody is left waiting."""

import pytest

from parallel.errors import Mistake
from parallel.grid import Grid, make_grid
from parallel.together import everyone, on_first, together
from tests.harness import run_ranks


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
    return heard, everyone(grid.rank * 10, grid), on_first(grid.rank, grid)


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
    assert everyone("x", Grid()) == ["x"] and on_first("x", Grid()) == ["x"]
