"""Small real runs on forked ranks, for tests of resuming and of faults, and the faults that tests cause in them."""

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from safetensors import safe_open

from parallel.errors import Mistake
from research import ROOT
from research.cluster import forked_ranks
from research.config.experiment_folder import LoadedExperiment, load
from research.tracking import metrics
from research.tracking.run_folder import RunFolder, every
from research.verification import small_run
from tests.harness import start_server

DROPS = {f"{place}_dropout": 0.1 for place in ("embedding", "residual", "mlp", "attention")}
LIMIT, GRACE = 240.0, 10.0
"""Seconds until a small run is killed (on two idle cores one takes two to five), and until ranks that survive a failed one are ended."""


@dataclass(frozen=True)
class Ended:
    """A small run that has ended: the ranks' exit codes, what they printed, the run's folder."""

    codes: list[int]
    said: str
    run: RunFolder | None
    """None if it was refused before its first step."""

    @property
    def folder(self) -> RunFolder:
        assert self.run is not None, self.said
        return self.run

    def rows(self, key: str = "train/loss") -> dict[int, float]:
        """step -> value; the last one if a step has several rows."""
        return {row["progress/step"]: row[key] for row in metrics.read(self.folder.metrics) if key in row}

    def hexes(self, key: str = "train/loss") -> dict[int, str]:
        """`rows`, with values as hexadecimal floats."""
        return {step: float(value).hex() for step, value in self.rows(key).items()}


class Stage:
    """A folder with small texts for small runs of one experiment. Runs with different names have different folders of runs."""

    def __init__(self, place: Path, experiment: str = "gpt_sotu") -> None:
        start_server()  # the tests' own, which has more imported; forked_ranks forks from whichever runs
        self.place, self.loaded = place, load(ROOT / "experiments" / experiment)
        small_run.write_texts(self.loaded, place)

    def small(self, name: str, changes: dict[str, Any]) -> LoadedExperiment:
        return small_run.small(self.loaded, self.place, {**changes, "track": {"runs": str(self.place / name), **changes.get("track", {})}})

    def run(self, name: str, world: int = 1, resume: str = "never", prelude: Callable[[int], None] | None = None, **changes: Any) -> Ended:
        """Starts a small run and waits for its end. `changes` are settings by group, e.g. parallel={"tensor": 2}."""
        loaded, output = self.small(name, changes), self.place / f"{name}.txt"
        before = output.stat().st_size if output.exists() else 0
        ranks = small_run.start(loaded, world, output, resume, prelude)
        try:
            _wait_for(ranks)
            codes = [-1 if process.exitcode is None else process.exitcode for process in ranks]
        finally:
            forked_ranks.end(ranks)
        said = output.read_bytes()[before:].decode(errors="replace")
        made = every(Path(loaded.experiment.track.runs))
        return Ended(codes, said, small_run.newest_run(loaded.experiment) if made else None)


def _wait_for(ranks: list) -> None:
    """Waits until all ranks have ended. Once one has failed, the others have GRACE seconds left, as under a launcher."""
    deadline = time.monotonic() + LIMIT
    while (waiting := [process for process in ranks if process.exitcode is None]) and time.monotonic() < deadline:
        wait([process.sentinel for process in waiting], timeout=max(0.0, deadline - time.monotonic()))
        if any(process.exitcode for process in ranks):
            deadline = min(deadline, time.monotonic() + GRACE)


def bits(folder: RunFolder) -> dict[str, bytes]:
    """Every tensor of the newest checkpoint as bytes, by file and key, read with safetensors alone. For files of one layout only."""
    newest = folder.checkpoints / (folder.checkpoints / "latest").read_text()
    tensors = {}
    for file in sorted(newest.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {f"{file.name.partition('-')[0]} {key}": opened.get_tensor(key).numpy().tobytes() for key in opened.keys()}  # noqa: SIM118
    return tensors


# Faults. These are preludes: every rank calls them before it trains.


def before_step(rank: int, number: int, act: Callable[[Any], None]) -> None:
    """Calls `act(monitor)` on this rank before step `number`, with the rank's AnomalyMonitor, which knows the engine."""
    from research.training.anomalies import AnomalyMonitor

    begin_step = AnomalyMonitor.begin_step

    def acting(monitor: AnomalyMonitor, step: int) -> None:
        if step == number:
            act(monitor)
        begin_step(monitor, step)

    AnomalyMonitor.begin_step = acting  # type: ignore[method-assign]


def stopped_in_step_6(rank: int) -> None:
    """One rank gets SIGUSR1 during step 6: all ranks stop after it."""
    if rank == 0:
        before_step(rank, 6, lambda monitor: os.kill(os.getpid(), signal.SIGUSR1))


def killed_in_step_8(rank: int) -> None:
    """SIGKILL before step 8. On two ranks the harness ends the survivor."""
    before_step(rank, 8, lambda monitor: os.kill(os.getpid(), signal.SIGKILL))


def signalled(number: int, victim: int, step: int, rank: int) -> None:
    """Rank `victim` gets this signal before this step."""
    if rank == victim:
        before_step(rank, step, lambda monitor: os.kill(os.getpid(), number))


def raises_in_step(step: int, rank: int) -> None:
    """An error on rank 1 before this step."""

    def fail(monitor: Any) -> None:
        raise RuntimeError("a fault of ours")

    if rank == 1:
        before_step(rank, step, fail)


def nan_gradient_in_step_5(rank: int) -> None:
    """On rank 1 alone, one parameter's gradient is NaN in step 5."""

    def poison(monitor: Any) -> None:
        parameter = monitor.engine.parameters["blocks.1.mlp.up.weight"]
        seen: list[bool] = []

        def spoiled(gradient):
            seen.append(True)
            return gradient * math.nan if len(seen) == 1 else gradient

        monitor.poisoned = parameter.register_hook(spoiled)
        monitor.non_finite = type(monitor.non_finite)(monitor.engine.parameters)  # hooks run in the order they were made

    if rank == 1:
        before_step(rank, 5, poison)
        before_step(rank, 6, lambda monitor: monitor.poisoned.remove())


def nan_from_step_5_on(rank: int) -> None:
    """Every step's loss is NaN from the fifth on, on every rank."""
    from parallel.engines.micro_batch import MicroBatch
    from research.training import loop

    batches = loop.step_batches

    def weights_of_nan(run):
        factor = math.nan if run.step + 1 >= 5 else 1.0
        for ids, (targets, weights), context in batches(run):
            yield MicroBatch(ids, (targets, weights * factor), context)

    loop.step_batches = weights_of_nan


PHASES = {  # a phase of a save -> the function that a rank is killed on entering
    "begun": ("parallel.checkpoint.writer", "begin"),
    "a file is begun": ("parallel.checkpoint.writer", "TensorFile"),
    "a file is complete": ("parallel.checkpoint.tensor_file", "TensorFile.close"),
    "all files are complete": ("parallel.checkpoint.writer", "CheckpointWriter.finish"),
    "before the manifest": ("parallel.checkpoint.writer", "publish"),
    "before the rename": ("parallel.checkpoint.folder", "sync_folder"),
    "before latest": ("parallel.checkpoint.folder", "point_latest"),
    "before an old one goes": ("parallel.checkpoint.folder", "_delete"),
}


def killed_in_a_save(phase: str, victim: int, times: int, rank: int) -> None:
    """SIGKILL on rank `victim` as it enters that phase of a save for the `times`-th time in the run."""
    import importlib

    if rank != victim:
        return
    module, path = PHASES[phase]
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    inner, entered = getattr(owner, name), [0]

    def enter(*arguments: Any, **settings: Any) -> Any:
        entered[0] += 1
        if entered[0] == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*arguments, **settings)

    setattr(owner, name, enter)


def disk_full_in_save_2(rank: int) -> None:
    """From the second save on, rank 1 cannot write a file longer than 20 kB: the kernel's limit, EFBIG."""
    import resource

    from research.training.checkpointer import Checkpointer

    save, saves = Checkpointer.save, [0]

    def limited(checkpointer: Any) -> None:
        saves[0] += 1
        if saves[0] == 2 and rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        save(checkpointer)

    Checkpointer.save = limited  # type: ignore[method-assign]


def other_seed_on_rank_1(rank: int) -> None:
    """Rank 1 has another seed than the other ranks."""
    from research.training import preflight

    claims = preflight.claims

    def other_seed(job: Any, host: str) -> Any:
        found = claims(job, host)
        return replace(found, named={**found.named, "settings": {**found.named["settings"], "seed": 99}})

    if rank == 1:
        preflight.claims = other_seed


def other_text_on_rank_1(rank: int) -> None:
    """The training text of rank 1's machine is damaged; rank 0's is not."""
    from research.data import prepare

    def damaged(*arguments: Any) -> Any:
        raise Mistake("data.train = 'train.txt' is damaged → copy it again")

    if rank == 1:
        prepare.load = damaged


def crash_before_step_1(rank: int) -> None:
    """An error that is no user's."""
    from research.training import setup

    def fails(*arguments: Any) -> Any:
        raise RuntimeError("a fault of ours")

    setup.build_engine = fails


def no_room(rank: int) -> None:
    """The disk has a kilobyte left."""
    from research.training import preflight

    preflight.free_bytes = lambda folder: 1000


def folder_is_read_only(rank: int) -> None:
    """The file system of the run folder turns read-only before the preflight: writes fail with EROFS."""
    import errno
    from pathlib import Path

    from research.training import preflight

    disk_trouble, write = preflight.disk_trouble, Path.write_bytes

    def read_only(*arguments: Any) -> Any:
        def refuse(path: Path, data: bytes) -> int:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

        Path.write_bytes = refuse  # type: ignore[method-assign]
        try:
            return disk_trouble(*arguments)
        finally:
            Path.write_bytes = write  # type: ignore[method-assign]

    preflight.disk_trouble = read_only
