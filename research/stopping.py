"""A request to stop, from a person or a scheduler, that all ranks obey at the same step."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from parallel.distributed import device

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """Notes a signal and lets the current step end. Ctrl-C reaches ranks at different moments; `agreed` makes it one."""

    def __init__(self) -> None:
        self.signal = 0
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number

    def agreed(self) -> int:
        """The signal that any rank has received, 0 for none; equal on every rank. One all-reduce of an integer."""
        found = torch.tensor([self.signal], device=device())
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        self.signal = int(found)
        return self.signal
