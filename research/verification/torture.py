"""`python -m research torture`: kill ranks at random moments, go on, and see whether anything is lost. Nothing must be."""

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from research.cluster import forked_ranks
from research.config.experiment_folder import LoadedExperiment
from research.tracking import metrics
from research.tracking.console import Console
from research.verification import small_run

LAYOUTS: dict[str, dict[str, int]] = {"DP2": {}, "TP2": {"tensor": 2}, "PP2": {"pipe": 2}}
WORLD = 2
PATIENCE, GRACE = 120.0, 10.0
"""Seconds until a start counts as hung, and until those that are left of one are ended as a launcher would."""
MOST_STARTS = 12
"""Of one trial: more would mean that it makes no progress."""


@dataclass(frozen=True)
class Trial:
    """One disturbed run: on which layout, how often it was started and killed, and what was lost (empty: nothing)."""

    layout: str
    starts: int
    kills: int
    seconds: float
    lost: str


def torture(loaded: LoadedExperiment, place: Path, trials: int, kills: int, seed: int) -> int:
    """0 where no run lost anything, else 1."""
    report, dice = Console(), random.Random(seed)
    report.header([("", f"torture {loaded.name} · {trials} trials, up to {kills} kills each, seed {seed}"), ("", "")])
    small_run.write_texts(loaded, place)
    truths: dict[str, Truth] = {}
    done = []
    for number in range(trials):
        layout = list(LAYOUTS)[number % len(LAYOUTS)]
        if layout not in truths:
            truths[layout] = undisturbed(small(loaded, place, layout, "undisturbed"), place)
        done.append(trial(small(loaded, place, layout, f"trial_{number}"), layout, truths[layout], dice, kills, place))
        report.header([("lost" if done[-1].lost else "kept", line(number, done[-1]))])
    lost = [trial for trial in done if trial.lost]
    kills, starts = sum(trial.kills for trial in done), sum(trial.starts for trial in done)
    report.header([("", ""), ("done", f"{len(lost)} lost runs of {trials} · {kills} kills, {starts} starts")])
    return 1 if lost else 0


def line(number: int, trial: Trial) -> str:
    """A trial as a person reads it."""
    what = trial.lost or "every loss bit for bit"
    return f"trial {number + 1} · {trial.layout} · {trial.kills} kills, {trial.starts} starts · {trial.seconds:.1f} s · {what}"


def small(loaded: LoadedExperiment, place: Path, layout: str, name: str) -> LoadedExperiment:
    """The experiment in small on a layout, its runs in a folder of their own."""
    parallel = {"zero_stage": 1, "pipe": 1, "tensor": 1, "sequence": False} | LAYOUTS[layout]
    changes: dict[str, dict[str, Any]] = {"parallel": parallel, "track": {"runs": str(place / name)}}
    return small_run.small(loaded, place, changes)


@dataclass(frozen=True)
class Truth:
    """What an undisturbed run recorded, and how long it took."""

    losses: dict[int, str]
    """step -> its loss as a hexadecimal float."""
    seconds: float


def undisturbed(loaded: LoadedExperiment, place: Path) -> Truth:
    """The run that nobody disturbs."""
    began = time.monotonic()
    codes = carried_out(loaded, place / "undisturbed.txt", "never", None, None)
    if any(codes):
        raise Mistake(
            f"{loaded.name} does not train even undisturbed (exit codes {codes}) → {(place / 'undisturbed.txt').read_text()[-400:]}"
        )
    return Truth(losses(loaded), time.monotonic() - began)


def trial(loaded: LoadedExperiment, layout: str, truth: Truth, dice: random.Random, kills: int, place: Path) -> Trial:
    """Starts, kills and starts again until the run is done."""
    began, planned, killed, starts, codes = time.monotonic(), dice.randint(1, kills), 0, 0, [1]
    output = place / f"{Path(loaded.experiment.track.runs).name}.txt"
    while any(codes) and starts < MOST_STARTS:
        victim, moment = dice.randrange(WORLD), dice.uniform(0.0, truth.seconds)
        disturb = killed < planned
        codes = carried_out(loaded, output, "auto", victim if disturb else None, moment)
        killed, starts = killed + (disturb and any(codes)), starts + 1
        if not disturb and any(codes):
            return Trial(layout, starts, killed, time.monotonic() - began, f"could not go on: exit codes {codes}, {said(output)}")
    return Trial(layout, starts, killed, time.monotonic() - began, difference(truth.losses, losses(loaded)))


def carried_out(loaded: LoadedExperiment, output: Path, resume: str, victim: int | None, moment: float | None) -> list[int]:
    """One start to its end, the victim killed at that moment; the ranks' exit codes. None outlives it."""
    under_way = small_run.begin(small_run.Start(loaded, WORLD, output, resume))
    try:
        if victim is not None:
            under_way[victim].join(moment)
            if under_way[victim].exitcode is None:
                under_way[victim].kill()
            under_way[victim].join()
        deadline = time.monotonic() + (PATIENCE if victim is None or under_way[victim].exitcode == 0 else GRACE)
        for process in under_way:
            process.join(max(0.1, deadline - time.monotonic()))
        return [-1 if process.exitcode is None else process.exitcode for process in under_way]
    finally:
        forked_ranks.end(under_way)


def losses(loaded: LoadedExperiment) -> dict[int, str]:
    """step -> loss of the one run in the experiment's folder of runs; where there are several, of the newest."""
    folder = small_run.newest(loaded.experiment)
    return {row["progress/step"]: float(row["train/loss"]).hex() for row in metrics.read(folder.metrics) if "train/loss" in row}


def difference(truth: dict[int, str], found: dict[int, str]) -> str:
    """What differs, as a sentence; empty where nothing does."""
    if missing := sorted(truth.keys() - found.keys()):
        return f"step {missing[0]} and {len(missing) - 1} more are missing"
    wrong = [step for step in sorted(truth) if truth[step] != found[step]]
    return f"step {wrong[0]}: loss {found[wrong[0]]} instead of {truth[wrong[0]]}" if wrong else ""


def said(output: Path) -> str:
    """The last line that is no empty one."""
    lines = output.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing was said"
