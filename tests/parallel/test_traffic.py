"""DeepSpeed's communication in closed form, checked by hand on small sizes; tests/research/verification/test_ledger.py measures it."""

import pytest

from parallel.traffic import data_calls, pipe_calls

SHAPES = [(5, 3), (7,), (2, 2)]  # 19 in matrices, 7 in vectors


def elements(stage: int, data: int, micro_batches: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for call in data_calls(stage, SHAPES, data, micro_batches):
        found.setdefault(call.operation, []).append(call.elements * call.times)
    return found


def test_one_data_rank_is_silent() -> None:
    assert elements(3, 1, 4) == {}


def test_stage_1_reduces_once_and_gathers_padded_groups() -> None:
    assert elements(1, 4, 3) == {"all_reduce": [26], "all_gather": [24 + 8]}  # 19 → 24, 7 → 8: multiples of 2·4


def test_stage_2_reduces_in_every_micro_batch() -> None:
    assert elements(2, 2, 3) == {"all_reduce": [3 * 26], "all_gather": [20 + 8]}


def test_stage_3_pads_each_parameter_and_refuses_what_it_cannot_count() -> None:
    assert elements(3, 4, 2) == {"reduce_scatter": [2 * (16 + 8 + 4)], "all_gather": [16 + 8 + 4]}
    with pytest.raises(ValueError, match="100489 > 100000"):
        list(data_calls(3, [(317, 317)], 2, 1))


@pytest.mark.parametrize(("stage", "neighbours", "ties"), [(0, 1, 1), (1, 2, 0), (2, 2, 0), (3, 1, 1)])
def test_a_stage_sends_to_its_neighbours(stage: int, neighbours: int, ties: int) -> None:
    calls = {call.operation: (call.times, call.elements) for call in pipe_calls(stage, 4, 100, "b·s·h", 6, tied=33)}
    assert calls == {"send": (6 * neighbours, 100), "recv": (6 * neighbours, 100)} | ({"all_reduce": (1, 33)} if ties else {})


def test_one_stage_is_silent() -> None:
    assert list(pipe_calls(0, 1, 100, "b·s·h", 6, tied=33)) == []
