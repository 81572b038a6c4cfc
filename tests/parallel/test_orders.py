"""Orders arrive as they were told, short or long, on every rank."""

from parallel.grid import make_grid
from parallel.orders import HEAD, hear, tell
from tests.harness import run_ranks

SHORT = [[[7]], [[1], [], [2, 3]], [[-5, 2**40]], [[]]]
ORDERS = [*SHORT, [list(range(HEAD - 3))], [list(range(HEAD - 2))], [[9], list(range(5 * HEAD)), [4]]]


def exchanged(orders: list) -> list:
    """What this rank heard; rank 0 tells."""
    group = make_grid(1, 3).tensor_group
    assert group is not None
    if group.rank() > 0:
        return [hear(group) for _ in orders]
    for order in orders:
        tell(order, group)
    return orders


def test_orders_arrive_as_they_were_told():
    assert run_ranks(exchanged, 3, ORDERS) == [ORDERS] * 3
