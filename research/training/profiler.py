"""Records the steps of `profile.steps`: torch's trace of every rank, the time of each layer, the collectives by axis, allocations.

Files go to profile/ in the run's folder: rank_0.json.gz … (chrome://tracing, ui.perfetto.dev), summary.json and summary.txt. Recording
changes no number of the training, but makes its steps slower: torch.profiler notes every operation, and the ledger sees each of them.
"""

import contextlib
import gzip
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from parallel.engines.engine import Engine
from parallel.engines.micro_batch import MicroBatch
from parallel.files import published, write_json
from parallel.layer_timer import DATA, OPTIMIZER, Label, LayerTimer
from parallel.ledger import TimedLedger, bookkeeping
from parallel.object_collectives import gather_objects
from research.training import profile_summary
from research.training.state import Run

MOST_OPERATIONS = 200
"""Of the operations that allocate, how many are kept, the largest."""
MOST_ALLOCATIONS = 1_000_000
"""How many allocations CUDA's memory history keeps."""


class StepProfiler:
    """Records the steps of `profile.steps` of a run. All methods are collective; without steps to record they do nothing."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.steps = run.job.experiment.profile.recorded
        self._recording: Recording | None = None
        self._before_ms = 0.0
        if self.steps and self.steps[-1] <= run.step:
            asked = run.job.experiment.profile.steps
            run.console.warn(f"profile.steps = {asked!r} are over: the run goes on after step {run.step} → name later steps, or None")

    def step(self, step: int) -> AbstractContextManager[None]:
        """Around the optimizer step `step`, counted from 1."""
        return self._recorded(step) if step in self.steps else contextlib.nullcontext()

    def batches(self, batches: Iterable[MicroBatch]) -> Iterable[MicroBatch]:
        """The same micro-batches; in a recorded step the time until each is there is recorded as that of the data."""
        return self._recording.batches(batches) if self._recording else batches

    @contextlib.contextmanager
    def _recorded(self, step: int) -> Iterator[None]:
        if self._recording is None:
            self._before_ms = self.run.meter.mean_step_ms()
            self._recording = Recording(self.run.engine, self.run.job.experiment.profile.memory, self.run.folder.rank_log(self._rank))
        with self._recording.step(step):
            yield
        if step == self.steps[-1]:
            self.close()

    def close(self) -> None:
        """Writes what was recorded, shows the summary, and removes everything that recording has added to the engine."""
        recording, self._recording, run = self._recording, None, self.run
        if recording is None:
            return
        folder = run.folder.profile
        with run.progress.work("writing the profile"), run.meter.paused("profile"):
            own, refusals = recording.stop(), list[str]()
            with refused_by_the_disk(refusals):
                run.locked.check()
                folder.mkdir(exist_ok=True)
                recording.write(folder, self._rank)
            if not (ranks := gather_objects((own, refusals), run.engine.grid)):
                return
            summary = profile_summary.Summary(recording.steps, [found for found, _ in ranks], self._before_ms)
            refusals = [f"of rank {rank} {why}" for rank, (_, refused) in enumerate(ranks) for why in refused]
            with refused_by_the_disk(refusals):
                run.locked.check()
                write_json(folder / "summary.json", summary.to_json())
                with published(folder / "summary.txt") as temporary:
                    temporary.write_text("\n".join(summary.lines(every_block=True)) + "\n", encoding="utf-8")
            for why in refusals:
                run.console.warn(f"the profile {why}")
            run.console.lines([*summary.lines(), f"traces and summary: {run.folder.shown}/profile"])

    @property
    def _rank(self) -> int:
        return self.run.engine.grid.rank


class Recording:
    """What is recorded of some steps on this rank. The steps need not follow each other without work in between."""

    def __init__(self, engine: Engine, memory: bool, log: Path) -> None:
        """`log`: the file that takes what torch.profiler writes to standard error."""
        self.engine, self.log, self.memory = engine, log, memory
        self.steps: list[int] = []
        self.cuda = engine.device.type == "cuda"
        self.timer, self.ledger = LayerTimer(engine.device), TimedLedger(engine.grid)
        self._restore = engine.watch_layers(lambda name, call: self.ledger.within(name, self.timer.within(name, call)))
        self._update = engine.optimizer.step
        engine.optimizer.step = self._timed_update
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
        self.profile = profile(activities=activities, profile_memory=memory)
        with error_stream_to(log):
            self.profile.start()
        if memory and self.cuda:
            torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around one optimizer step."""
        self.steps.append(step)
        self.ledger.between_steps()
        warned = error_stream_to(self.log) if self.memory else contextlib.nullcontext()  # of what was allocated before the recording
        with warned, torch.profiler.record_function(f"step {step}"), self.ledger:
            self.timer.begin()
            try:
                yield
            finally:
                self.timer.end()

    def batches(self, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro-batches of a step, with the time until each is there."""
        source, over = iter(batches), object()
        while True:
            with self.timer.during(Label(DATA)):
                batch = next(source, over)
            if batch is over:
                return
            yield batch  # type: ignore[misc]

    def stop(self) -> dict[str, Any]:
        """Ends the recording; returns this rank's part of summary.json."""
        self._restore()
        self.timer.remove()
        self.engine.optimizer.step = self._update
        with error_stream_to(self.log):
            self.profile.stop()
        grid, spent = self.engine.grid, self.timer.spent()
        found = {
            "rank": grid.rank,
            **{axis: getattr(grid, f"{axis}_rank") for axis in ("pipe", "data", "tensor")},
            "seconds": sum(part.seconds for part in spent.values()),
            "layers": [{**label._asdict(), **part._asdict()} for label, part in spent.items()],
            "collectives": collectives(self.ledger),
        }
        return found | ({"memory": allocations(self.profile)} if self.memory else {})

    def write(self, folder: Path, rank: int) -> None:
        """Writes the trace, compressed, and on a GPU with `profile.memory` the history of its allocations."""
        trace = folder / f"rank_{rank}.json.gz"
        with published(trace) as temporary:
            plain = temporary.with_suffix(".json")
            try:
                self.profile.export_chrome_trace(str(plain))
                with plain.open("rb") as source, gzip.open(temporary, "wb", compresslevel=5) as target:
                    shutil.copyfileobj(source, target)
            finally:
                plain.unlink(missing_ok=True)
        if self.memory and self.cuda:  # for pytorch.org/memory_viz
            with published(folder / f"rank_{rank}_memory.pickle") as temporary:
                torch.cuda.memory._dump_snapshot(str(temporary))
            torch.cuda.memory._record_memory_history(enabled=None)

    def _timed_update(self, *arguments: Any, **settings: Any) -> Any:
        with self.timer.during(Label(OPTIMIZER)):
            return self._update(*arguments, **settings)


@contextlib.contextmanager
def refused_by_the_disk(refusals: list[str]) -> Iterator[None]:
    """A disk that refuses the profile ends no run: why it did is added to `refusals`."""
    try:
        yield
    except OSError as error:
        refusals.append(f"could not be written ({error.filename or 'its folder'}: {error.strerror or error})")


def collectives(ledger: TimedLedger) -> list[dict[str, Any]]:
    """The ledger's entries, one for each axis, operation, layer and direction: calls, elements and bytes of whole tensors, seconds."""
    calls: Counter[tuple] = Counter()
    sums: dict[tuple, list[float]] = defaultdict(lambda: [0, 0, 0.0, 0.0])
    for entry, seconds in zip(ledger.entries, ledger.seconds, strict=True):
        key = (entry.axis, entry.operation, entry.layer, entry.direction, bookkeeping(entry))
        calls[key] += 1
        sums[key] = [was + more for was, more in zip(sums[key], (entry.elements, entry.bytes, entry.sent, seconds), strict=True)]
    names, amounts = ("axis", "operation", "layer", "direction", "bookkeeping"), ("elements", "bytes", "sent_bytes", "seconds")
    return [dict(zip(names, key, strict=True)) | {"calls": calls[key]} | dict(zip(amounts, sums[key], strict=True)) for key in calls]


def allocations(recorded: profile) -> list[dict[str, Any]]:
    """Bytes that each operation, and each range of a layer, has allocated and not freed again itself; the largest first."""
    found = []
    for event in recorded.key_averages():
        label = event.is_user_annotation
        kept = {"bytes": event.cpu_memory_usage if label else event.self_cpu_memory_usage}
        kept |= {"device_bytes": event.device_memory_usage if label else event.self_device_memory_usage}
        if max(kept.values()) > 0 and not event.key.startswith(("step ", "ProfilerStep")):
            found.append({"name": event.key, "is_layer": bool(label), "calls": event.count, **kept})
    return sorted(found, key=lambda one: -max(one["bytes"], one["device_bytes"]))[:MOST_OPERATIONS]


@contextlib.contextmanager
def error_stream_to(log: Path) -> Iterator[None]:
    """Inside, standard error goes to the end of `log`: torch.profiler's C++ code says there when it begins and ends."""
    sys.stderr.flush()
    try:
        with log.open("ab") as file:
            kept = os.dup(2)
            os.dup2(file.fileno(), 2)
    except OSError:  # there is no standard error, or no log: then it says what it says
        yield
        return
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
