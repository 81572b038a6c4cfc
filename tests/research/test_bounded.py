"""A call gets its time and no more."""

import time

from research.bounded import bounded

LONG = 30.0


def test_a_result_or_none():
    assert bounded(lambda: 3, LONG) == 3
    assert bounded(lambda: 1 / 0, LONG) is None


def test_what_takes_too_long_is_left():
    began = time.monotonic()
    assert bounded(lambda: time.sleep(LONG), 0.1) is None
    assert bounded(lambda: time.sleep(LONG), -1.0) is None  # what is left of a time that is up
    assert time.monotonic() - began < LONG / 2
