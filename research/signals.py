"""The signals that ask a run to end. Imports no torch."""

import signal
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""SIGHUP is a terminal that was closed or a connection that broke; under nohup it is ignored, and stays so."""
SIGNALLED = 128
"""Exit code of a run that a signal ended: 128 + the signal's number, as shells report it."""


def catch(handler: Callable[[int, FrameType | None], None]) -> None:
    """From now on each of them calls the handler. On the main thread."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
