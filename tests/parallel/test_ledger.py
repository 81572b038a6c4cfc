"""The ledger on real ranks: how it records known collectives, that it changes nothing, and that it names ranks that disagree."""

import time

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import copy_to_tensor_ranks, gather_sequence
from parallel.grid import Grid, make_grid
from parallel.ledger import Entry, Ledger, TimedLedger, axis_of, bookkeeping, first_difference
from tests.harness import run_ranks


def known() -> list[Entry]:
    grid = make_grid(1, 2)  # data 2 × tensor 2
    seen: list[Entry] = []
    ledger = Ledger(grid, seen.append)
    x = torch.ones(2, 3, 5, requires_grad=True)
    layer = ledger.within("blocks.7", lambda x: gather_sequence(copy_to_tensor_ranks(x, grid.tensor_group), grid.tensor_group))
    with ledger:
        layer(x).sum().backward()
        ledger.between_steps()
        dist.all_reduce(torch.ones(4, dtype=torch.bfloat16), group=grid.data_group)
        dist.broadcast(torch.zeros(3, dtype=torch.int64), src=0)
        if grid.rank < 2:
            (dist.send if grid.rank == 0 else dist.recv)(torch.zeros(6), 1 - grid.rank)
        dist.barrier()
    assert torch.equal(x.grad, torch.full_like(x, 4.0))  # gathered by two, summed over two: the ledger only listens
    dist.all_reduce(torch.ones(1))
    return seen


def test_known_collectives_are_noted_with_axis_size_layer_and_site() -> None:
    first, second, third, _ = run_ranks(known, 4)
    facts = [(entry.operation, entry.axis, entry.ranks, entry.elements, entry.layer, entry.direction) for entry in first]
    assert facts == [
        ("all_gather", "tensor", (0, 1), 60, "blocks.7", "forward"),
        ("reduce_scatter", "tensor", (0, 1), 60, "blocks.7", "backward"),
        ("all_reduce", "tensor", (0, 1), 30, "blocks.7", "backward"),
        ("all_reduce", "data", (0, 2), 4, "", ""),
        ("broadcast", "data × tensor", (0, 1, 2, 3), 3, "", ""),
        ("send", "tensor", (0, 1), 6, "", ""),
        ("barrier", "data × tensor", (0, 1, 2, 3), 0, "", ""),
    ]
    assert [entry.operation for entry in second][-2:] == ["recv", "barrier"] and second[-2].ranks == (0, 1)
    assert third[0].ranks == (2, 3)
    assert all(entry.site.startswith("parallel/collectives.py:") for entry in first[:3])
    assert first[3].site.startswith("tests/parallel/test_ledger.py:")
    assert first_difference([first, second, third, _]) is None


def timed() -> tuple[list[tuple], list[float], bool]:
    """Three collectives; rank 1 comes half a second late to the second one, which is not waited for at once."""
    grid = make_grid(1, 2)
    before = {**vars(dist.ProcessGroup)}, vars(dist.Work)["wait"]
    ledger = TimedLedger(grid)
    layer = ledger.within("blocks.7", lambda x: copy_to_tensor_ranks(x, grid.tensor_group))
    x = torch.ones(4, requires_grad=True)
    with ledger:
        dist.barrier()
        layer(x).sum().backward()
        time.sleep(0.5 * grid.rank)
        ledger.between_steps()
        late = dist.all_reduce(torch.ones(7), group=grid.tensor_group, async_op=True)
        time.sleep(0.1)
        dist.all_reduce(torch.ones(1), group=dist.new_group([grid.rank], use_local_synchronization=True))
        late.wait()
        (dist.send if grid.rank == 0 else dist.recv)(torch.zeros(6), 1 - grid.rank)
    dist.all_reduce(torch.ones(1))
    restored = ({**vars(dist.ProcessGroup)}, vars(dist.Work)["wait"]) == before
    return (
        [(entry.operation, entry.elements, entry.layer, entry.direction, entry.site) for entry in ledger.entries],
        ledger.seconds,
        restored,
    )


def test_what_a_rank_waits_for_is_timed_and_torch_is_left_as_it_was() -> None:
    first, second = run_ranks(timed, 2)
    for rank, (entries, seconds, restored) in enumerate((first, second)):
        operations = [entry[:4] for entry in entries]
        assert operations == [
            ("barrier", 0, "", ""),
            ("all_reduce", 4, "blocks.7", "backward"),
            ("all_reduce", 7, "", ""),
            ("send" if rank == 0 else "recv", 6, "", ""),
        ]
        assert entries[1][-1].startswith("parallel/collectives.py:") and entries[2][-1].startswith("tests/parallel/test_ledger.py:")
        assert len(seconds) == 4 and all(value > 0 for value in seconds) and restored
    assert first[1][2] > 0.3 and first[1][2] > 2 * second[1][2], "rank 0 waits for rank 1, less the tenth of a second before its wait"


def test_bytes_on_a_ring() -> None:
    def entry(operation: str, elements: int, dtype: str, ranks: int) -> Entry:
        return Entry(operation, "tensor", tuple(range(ranks)), elements, dtype, "", "", "")

    assert entry("all_reduce", 100, "float16", 4).sent == 2 * 200 * 3 / 4
    assert entry("all_gather", 100, "float32", 4).sent == entry("reduce_scatter", 100, "float32", 4).sent == 400 * 3 / 4
    assert (entry("send", 10, "float32", 2).sent, entry("recv", 10, "float32", 2).sent) == (40, 0)
    assert bookkeeping(entry("all_reduce", 1, "float32", 2)) and bookkeeping(entry("send", 99, "int64", 2))
    assert not bookkeeping(entry("all_gather", 2, "float32", 2))


@pytest.mark.parametrize(
    ("ranks", "axis"), [((0, 1), "tensor"), ((0, 2), "data"), ((0, 4), "pipe"), ((1, 3, 5, 7), "pipe × data"), ((3,), "")]
)
def test_the_axis_of_a_group(ranks: tuple[int, ...], axis: str) -> None:
    assert axis_of(Grid(pipe=2, data=2, tensor=2), ranks) == axis


def entry(operation: str, elements: int, ranks: tuple[int, ...] = (0, 1), site: str = "a.py:1") -> Entry:
    return Entry(operation, "tensor", ranks, elements, "float32", "blocks.0", "forward", site)


def test_ranks_that_issue_something_else_are_named() -> None:
    good = [entry("all_reduce", 8), entry("all_gather", 4)]
    assert first_difference([good, good]) is None
    said = first_difference([good, [entry("all_reduce", 8), entry("all_reduce", 4, site="b.py:2")]])
    assert said is not None
    assert "ranks 0, 1 differ at their call 2" in said and "rank 0: all_gather of 4" in said
    assert "rank 1: all_reduce of 4 float32 at b.py:2 (blocks.0, forward)" in said
    assert "rank 1: issued nothing" in (first_difference([good, good[:1]]) or "")


def test_a_mismatch_says_more_than_something_missing() -> None:
    missing, other = entry("all_reduce", 8, (0, 2)), entry("broadcast", 9)
    said = first_difference([[missing, entry("all_gather", 9)], [other], []])
    assert said is not None and "broadcast" in said


def test_a_send_is_matched_with_its_receive() -> None:
    send, receive = entry("send", 8), entry("recv", 8)
    assert first_difference([[send], [receive]]) is None
    assert "rank 1: issued nothing" in (first_difference([[send, send], [receive]]) or "")
    assert "recv of 9" in (first_difference([[send], [entry("recv", 9)]]) or "")
