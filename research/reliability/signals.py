"""Handles the signals that ask a run to end. Before its first step a run leaves at once; later all ranks stop after the same step.

Importable without torch.
"""

import signal
from collections.abc import Callable
from types import FrameType

from research.cluster.exit_codes import SIGNALLED

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""SIGHUP: a terminal was closed or a connection broke. Under nohup it is ignored, and stays ignored."""


def catch(handler: Callable[[int, FrameType | None], None]) -> None:
    """Installs the handler for each of SIGNALS. Call it on the main thread."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def leave_when_asked() -> None:
    """From now on a signal raises SystemExit, so that open files are closed. Further signals (a launcher sends several) are ignored."""

    def leave(number: int, frame: FrameType | None) -> None:
        catch(ignore)  # not SIG_IGN: Python complains about a signal that is pending while that is set
        raise SystemExit(SIGNALLED + number)

    def ignore(number: int, frame: FrameType | None) -> None:
        return

    catch(leave)


class CutShort(Exception):
    """A signal ended a task before it was complete. Raised on every rank at the same point."""


TROUBLE = 512
"""Added to the exit code of a trouble while the ranks agree: a number that no signal has."""


class Stop:
    """Records a signal and lets the current step end. Ctrl-C reaches the ranks at different moments; `agreed` makes them stop together."""

    def __init__(self) -> None:
        self.signal = 0
        """The first signal received, here or by another rank; 0: none."""
        self.trouble = 0
        """The exit code of the trouble that ends the run, found here or by another rank; 0: none."""
        catch(self._record)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number

    def demand(self, code: int) -> None:
        """Stops the run as a signal would, because of a trouble that ends it with this exit code."""
        self.trouble = max(self.trouble, code)

    def agreed(self) -> int:
        """0 if no rank has a signal or a trouble; else a signal, or TROUBLE + an exit code. Equal on every rank, and so is `trouble`.

        Collective: one all-reduce of an integer in host memory, over gloo on every device, so that no rank waits for its GPU.
        """
        import torch
        import torch.distributed as dist

        agreed = torch.tensor([TROUBLE + self.trouble if self.trouble else self.signal])
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        found = int(agreed)
        if found > TROUBLE:
            self.trouble = found - TROUBLE
        else:
            self.signal = found or self.signal  # a signal that came during the all-reduce is found by the next one
        return found
