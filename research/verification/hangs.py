"""Ends the ranks of a layout that hangs, after seconds instead of minutes, and says where each of them stood."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parallel.layers import Call, CallHook
from research import ROOT
from research.cluster.exit_codes import HUNG
from research.reliability.diagnosis import odd_ones
from research.reliability.heartbeat import HANG, Heartbeat, Progress, stack_of

CHECK_SECONDS = 0.5
FRAMES = 4
"""How many frames of our own code a sentence shows, the innermost."""


@contextlib.contextmanager
def ended_if_hung(folder: Path, rank: int, seconds: float) -> Iterator[Progress]:
    """Inside, this rank ends with exit code HUNG if the yielded progress does not move for `seconds`. Enter it on the main thread.

    From half of that time on, the rank's place and stack are in a file of `folder`: when one rank ends, the others fail in the
    collective in which they wait for it, and no longer know that they hung.
    """
    progress, closed, main = Progress(), threading.Event(), threading.get_ident()

    def check() -> None:
        moves, idle = progress.moves, 0.0
        while not closed.wait(CHECK_SECONDS):  # intervals are counted, so that a pause of the whole machine is short
            idle = idle + CHECK_SECONDS if progress.moves == moves else 0.0
            moves, left = progress.moves, HANG if idle >= seconds else ""
            if idle >= seconds / 2:
                now = time.strftime("%H:%M:%S", time.gmtime())
                place = (progress.stage.value, progress.doing, progress.step)
                heartbeat = Heartbeat(rank, os.getpid(), moves, now, *place, stack_of(main, ROOT), left=left)
                _file(folder, rank).write_text(json.dumps(asdict(heartbeat)))
            if left:
                os._exit(HUNG)

    thread = threading.Thread(target=check, name="hangs", daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        closed.set()


def advance_at_layers(progress: Progress) -> CallHook:
    """A hook that moves `progress` whenever the forward pass of a layer begins."""

    def advancing(layer: str, call: Call) -> Call:
        def advanced(*arguments: Any, **context: Any) -> Any:
            progress.advance(f"forward from {layer} on")
            return call(*arguments, **context)

        return advanced

    return advancing


def hung_ranks(folder: Path, world: int) -> dict[int, Heartbeat]:
    """Where each rank stood when nothing moved; empty if no rank ended because of that."""
    files = {rank: _file(folder, rank) for rank in range(world)}
    found: dict[int, Heartbeat] = {}
    for rank, file in files.items():
        with contextlib.suppress(OSError, ValueError):  # a rank that was killed while it wrote
            found[rank] = Heartbeat(**json.loads(file.read_text()))
    return found if any(heartbeat.left == HANG for heartbeat in found.values()) else {}


def describe_hang(seconds: float, heartbeats: dict[int, Heartbeat], world: int) -> str:
    """One line for the layout, and one for each rank: what it was doing, and our innermost frames."""
    lines, odd = [f"hangs: no rank made progress for {seconds:.0f} s"], odd_ones(heartbeats)
    for rank in range(world):
        if rank not in heartbeats:
            lines.append(f"rank {rank} says nothing")
            continue
        heartbeat = heartbeats[rank]
        ours = [frame for frame in heartbeat.stack if frame[0] not in "/…<"][-FRAMES:]
        waits = f", waits in {heartbeat.stack[-1].rpartition(' ')[2]}" if heartbeat.waits else ""
        lines.append(f"rank {rank} in step {heartbeat.step}, {heartbeat.doing}{waits}" + (" ← the odd one out" if rank in odd else ""))
        lines += [f"    {frame}" for frame in ours]
    return "\n".join(lines)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"hang_{rank}.json"
