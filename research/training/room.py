"""How much room the checkpoints of a run will need on its disk, by the settings that say which of them are kept."""

from collections.abc import Iterable
from pathlib import Path

from parallel.checkpoint import folder as checkpoint_folder
from research.config.schema import Checkpoints
from research.tracking.format import plural


def planned_saves(step: int, steps: int, every: int) -> list[int]:
    """The steps after which a run that is at `step` will save: each multiple of `every` (0: none), and the last one."""
    regular = range(step - step % every + every, steps, every) if every else range(0)
    return [*regular, steps] if step < steps else []


def bytes_needed(there: dict[int, int], planned: Iterable[int], size: int, keep: Checkpoints) -> int:
    """The most bytes beyond those of the checkpoints `there` ({step: bytes}) that the `planned` ones, of `size` bytes each, will take.

    A new checkpoint is complete before an older one is deleted, also one of the same step.
    """
    present, most = dict(there), 0
    before = used = sum(there.values())
    for step in planned:
        most = max(most, used + size - before)
        used += size - present.pop(step, 0)
        present[step] = size
        newest = sorted(present)[-keep.keep_last :]
        for old in [old for old in present if old not in newest and not (keep.keep_every and old % keep.keep_every == 0)]:
            used -= present.pop(old)
    return most


def sizes(checkpoints: Path) -> dict[int, int]:
    """{step: bytes} of the complete checkpoints on the disk."""
    found = {}
    for path in checkpoint_folder.steps(checkpoints):
        found[checkpoint_folder.step_of(path)] = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return found


def describe(need: int, size: int, keep: Checkpoints) -> str:
    """Why so many are on the disk at once: '3 at once with checkpoints.keep_last = 2 and the one that is being written'."""
    kept = f"checkpoints.keep_last = {keep.keep_last}" + (f" and keep_every = {keep.keep_every}" if keep.keep_every else "")
    return f"{plural(-(-need // max(1, size)), 'new one')} at once, with {kept}: an old one goes when a newer one is complete"
