"""What a signal does to a run: before there is anything to keep it ends at once, later all ranks stop after the same step."""
# MERGED-DOC """The signals that ask a run to end. Imports no torch."""

import signal
from collections.abc import Callable
from types import FrameType

from research.cluster.exit_codes import SIGNALLED

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""SIGHUP is a terminal that was closed or a connection that broke; under nohup it is ignored, and stays so."""


def catch(handler: Callable[[int, FrameType | None], None]) -> None:
    """From now on each of them calls the handler. On the main thread."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def leave_when_asked() -> None:
    """From now on a signal raises SystemExit: what is open gets closed. Further ones, a launcher sends several, do not disturb that."""

    def leave(number: int, frame: FrameType | None) -> None:
        catch(ignore)  # not SIG_IGN: Python complains of a signal that is on its way while it is set
        raise SystemExit(SIGNALLED + number)

    def ignore(number: int, frame: FrameType | None) -> None:
        return

    catch(leave)


class CutShort(Exception):
    """A signal ended something that is not done; on every rank at the same place."""


class Stop:
    """Notes a signal and lets the current step end. Ctrl-C reaches ranks at different moments; `agreed` makes it one."""

    def __init__(self) -> None:
        self.signal = 0
        catch(self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number

    def agreed(self) -> int:
        """The signal that any rank has received, 0 for none; equal on every rank. One all-reduce of an integer."""
        import torch
        import torch.distributed as dist

        from parallel.distributed import device

        found = torch.tensor([self.signal], device=device())
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        self.signal = int(found) or self.signal  # one that came during the all-reduce is found by the next
        return int(found)
