"""Kills ranks of small runs at random moments, resumes the runs, and compares every loss with that of an undisturbed run."""

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from research.cluster import forked_ranks
from research.config.experiment_folder import LoadedExperiment
from research.tracking import format as fmt
from research.tracking import metrics
from research.tracking.console import Console
from research.verification import small_run

LAYOUTS: dict[str, dict[str, int]] = {
    fmt.layout(1, 2, 1): {},
    fmt.layout(1, 1, 2): {"tensor": 2},
    fmt.layout(2, 1, 1): {"pipe": 2},
}
WORLD = 2
PATIENCE, GRACE = 120.0, 10.0
"""Seconds until a run counts as hung, and seconds until the ranks that survive a killed one are ended, as a launcher would do."""
MOST_STARTS = 12
"""Largest number of starts per trial. A trial that needs more makes no progress."""


@dataclass(frozen=True)
class Undisturbed:
    """What an undisturbed run recorded, and how long it took."""

    losses: dict[int, str]
    """step -> its loss as a hexadecimal float."""
    seconds: float


@dataclass(frozen=True)
class Trial:
    """One disturbed run: its layout, how often it was started and killed, and what it lost (empty if nothing)."""

    layout: str
    starts: int
    kills: int
    seconds: float
    lost: str


def torture(loaded: LoadedExperiment, place: Path, trials: int, kills: int, seed: int) -> tuple[list[Trial], int]:
    """Disturbs `trials` runs, each with up to `kills` kills, in the folder `place`. Returns them, and 0 if none lost anything, else 1."""
    console, generator = Console(), random.Random(seed)
    console.header([("", f"torture {loaded.name} · {trials} trials, up to {kills} kills each, seed {seed}"), ("", "")])
    small_run.write_texts(loaded, place)
    expected: dict[str, Undisturbed] = {}
    done = []
    for number in range(trials):
        layout = list(LAYOUTS)[number % len(LAYOUTS)]
        if layout not in expected:
            expected[layout] = undisturbed(on_layout(loaded, place, layout, "undisturbed"), place)
        trial = disturbed(on_layout(loaded, place, layout, f"trial_{number}"), layout, expected[layout], generator, kills, place)
        counts = f"{trial.kills} kills, {trial.starts} starts · {trial.seconds:.1f} s"
        text = f"trial {number + 1} · {layout} · {counts} · {trial.lost or 'every loss bit for bit'}"
        console.header([("lost" if trial.lost else "kept", text)])
        done.append(trial)
    lost = sum(bool(trial.lost) for trial in done)
    total_kills, starts = sum(trial.kills for trial in done), sum(trial.starts for trial in done)
    console.header([("", ""), ("done", f"{lost} lost runs of {trials} · {total_kills} kills, {starts} starts")])
    return done, 1 if lost else 0


def on_layout(loaded: LoadedExperiment, place: Path, layout: str, name: str) -> LoadedExperiment:
    """A small version of the experiment on a layout. Its runs go to the folder `name`."""
    parallel = {"zero_stage": 1, "pipe": 1, "tensor": 1, "sequence": False} | LAYOUTS[layout]
    changes: dict[str, dict[str, Any]] = {"parallel": parallel, "track": {"runs": str(place / name)}}
    return small_run.small(loaded, place, changes)


def undisturbed(loaded: LoadedExperiment, place: Path) -> Undisturbed:
    """Runs the experiment without disturbing it."""
    began = time.monotonic()
    output = place / "undisturbed.txt"
    codes = run_once(loaded, output, "never", None, None)
    if any(codes):
        raise Mistake(f"{loaded.name} does not train even undisturbed (exit codes {codes}) → {output.read_text()[-400:]}")
    return Undisturbed(losses(loaded), time.monotonic() - began)


def disturbed(
    loaded: LoadedExperiment, layout: str, expected: Undisturbed, generator: random.Random, most_kills: int, place: Path
) -> Trial:
    """Starts the run, kills a random rank at a random moment and resumes, until the run is done."""
    began, planned, kills, starts, codes = time.monotonic(), generator.randint(1, most_kills), 0, 0, [1]
    output = place / f"{Path(loaded.experiment.track.runs).name}.txt"
    while any(codes) and starts < MOST_STARTS:
        victim, moment = generator.randrange(WORLD), generator.uniform(0.0, expected.seconds)
        disturb = kills < planned
        codes = run_once(loaded, output, "auto", victim if disturb else None, moment)
        kills, starts = kills + (disturb and any(codes)), starts + 1
        if not disturb and any(codes):
            lines = output.read_text(errors="replace").strip().splitlines()
            lost = f"could not go on: exit codes {codes}, {lines[-1] if lines else 'nothing was said'}"
            return Trial(layout, starts, kills, time.monotonic() - began, lost)
    return Trial(layout, starts, kills, time.monotonic() - began, difference(expected.losses, losses(loaded)))


def run_once(loaded: LoadedExperiment, output: Path, resume: str, victim: int | None, moment: float | None) -> list[int]:
    """Starts the ranks, kills rank `victim` after `moment` seconds, and returns the ranks' exit codes. No rank outlives the call."""
    ranks = small_run.start(loaded, WORLD, output, resume)
    try:
        if victim is not None:
            ranks[victim].join(moment)
            if ranks[victim].exitcode is None:
                ranks[victim].kill()
            ranks[victim].join()
        deadline = time.monotonic() + (PATIENCE if victim is None or ranks[victim].exitcode == 0 else GRACE)
        for process in ranks:
            process.join(max(0.1, deadline - time.monotonic()))
        return [-1 if process.exitcode is None else process.exitcode for process in ranks]
    finally:
        forked_ranks.end(ranks)


def losses(loaded: LoadedExperiment) -> dict[int, str]:
    """step -> loss of the newest run in the experiment's folder of runs, as a hexadecimal float."""
    folder = small_run.newest_run(loaded.experiment)
    return {row["progress/step"]: float(row["train/loss"]).hex() for row in metrics.read(folder.metrics) if "train/loss" in row}


def difference(expected: dict[int, str], found: dict[int, str]) -> str:
    """The first difference of two runs' losses, as a sentence; empty if there is none."""
    if missing := sorted(expected.keys() - found.keys()):
        return f"step {missing[0]} and {len(missing) - 1} more are missing"
    wrong = [step for step in sorted(expected) if expected[step] != found[step]]
    return f"step {wrong[0]}: loss {found[wrong[0]]} instead of {expected[wrong[0]]}" if wrong else ""
