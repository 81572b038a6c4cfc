"""Runs the trials of a sweep, k at a time, each at most once; and gives their launches to Slurm's job arrays and W&B's agents."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from parallel.files import write_json
from research.ablation import trials as runs
from research.ablation.trial_processes import Processes, free_port
from research.ablation.trials import SEED, Factor, Trial
from research.cluster.environment import THREADS, Ranks, threads_asked_for, threads_per_rank
from research.config.experiment_folder import LoadedExperiment
from research.tracking import metrics
from research.tracking.run_folder import RunFolder

WAITING, RUNNING, DONE, FAILED, STOPPED = "waiting", "running", "done", "failed", "stopped"
METRIC = "val/bits_per_byte"
PORT_LAUNCHERS = ("deepspeed", "torchrun")
"""Launchers that take --master_port, which launches at the same time must not share."""


@dataclass
class State:
    """What is known of a trial."""

    trial: Trial
    status: str = WAITING
    run: RunFolder | None = None
    code: int | None = None
    """The exit code of its last launch."""
    seconds: float | None = None

    @property
    def best(self) -> float | None:
        """The lowest METRIC of its run."""
        values = [row[METRIC] for row in metrics.read(self.run.metrics) if METRIC in row] if self.run else []
        return min(values, default=None)


class Sweep:
    """The trials of one experiment. `file` is rewritten after each change; what has been run is read from the runs folder."""

    def __init__(self, loaded: LoadedExperiment, found: Sequence[Trial], root: Path, launcher: Sequence[str]) -> None:
        self.loaded, self.root, self.launcher = loaded, root, list(launcher)
        self.id = runs.sweep_id(loaded.name, found)
        place = root / found[0].experiment.track.runs / loaded.name / "sweeps"
        self.file, self.logs, self.lock = place / f"{self.id}.json", place / self.id, place / f".{self.id}"
        self.states = [State(trial) for trial in found]
        for state in self.states:
            state.run = runs.finished(runs.runs_of(state.trial, loaded, root))
            state.status = DONE if state.run else WAITING

    def run(self, jobs: int, to_logs: bool, report: Callable[[State], object]) -> int:
        """Runs what has not been run, `jobs` at a time. Returns the first signal that came, or 0.

        `to_logs`: what launches print goes to a file for each trial. `report` is told of each trial that begins or ends.
        """
        processes, left = Processes(), [state for state in self.states if state.status == WAITING]
        began: dict[int, float] = {}
        self.save()
        while (left and not processes.signal) or len(processes):
            while left and not processes.signal and len(processes) < jobs:
                state = left.pop(0)
                if (done := runs.finished(runs.runs_of(state.trial, self.loaded, self.root))) is not None:  # by somebody else, meanwhile
                    state.run, state.status = done, DONE
                    report(state)
                    continue
                number = state.trial.number
                state.status, began[number] = RUNNING, time.monotonic()
                log = self.log_of(state.trial) if to_logs else None
                processes.start(number, self.command(state.trial, jobs), log, self._environment(jobs))
                self.save()
                report(state)
            if len(processes):
                number, code = processes.wait()
                state = self.states[number]
                found = runs.runs_of(state.trial, self.loaded, self.root)
                state.run, state.code, state.seconds = runs.finished(found), code, time.monotonic() - began[number]
                state.status = DONE if state.run else STOPPED if processes.signal else FAILED
                state.run = state.run or (found[-1] if found else None)
                self.save()
                report(state)
        return processes.signal

    def log_of(self, trial: Trial) -> Path:
        """Where the output of a trial's launches goes."""
        return self.logs / f"{trial.number}.log"

    def command(self, trial: Trial, jobs: int = 1) -> list[str]:
        """The launch of a trial. It goes on with its own unfinished run, if there is one."""
        begun = runs.begun(runs.runs_of(trial, self.loaded, self.root))
        resume = ["--resume", str(begun.path)] if begun else []
        words = list(self.launcher)
        if jobs > 1 and Path(words[0]).name in PORT_LAUNCHERS and not any(word.startswith("--master_port") for word in words):
            words[1:1] = ["--master_port", str(free_port(trial.number))]
        return [*words, str(self.loaded.folder / "launch.py"), *trial.arguments, *self._tracking(trial), *resume]

    def _tracking(self, trial: Trial) -> list[str]:
        """The settings that bring a sweep's runs together in W&B: one group, and a tag for each factor."""
        track = trial.experiment.track
        group = [] if track.group else [f"--track.group={self.loaded.name}-sweep-{self.id}"]
        return [*group, "--track.tags", *track.tags, f"sweep:{self.id}", *trial.tags]

    def _environment(self, jobs: int) -> dict[str, str]:
        """Launches at the same time divide the cores."""
        if jobs == 1 or threads_asked_for() is not None:
            return {}
        return {THREADS: str(threads_per_rank(Ranks(0, 0, jobs, jobs, "python", "", 0)))}

    def save(self) -> None:
        """Writes `file`."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, {"sweep": self.id, "experiment": self.loaded.name, "trials": [self._as_json(state) for state in self.states]})

    def _as_json(self, state: State) -> dict[str, Any]:
        trial = state.trial
        facts = {"status": state.status, "run": state.run and str(state.run.path), "code": state.code, "seconds": state.seconds}
        return {"settings": dict(trial.factors), "seed": trial.seed, "arguments": list(trial.arguments), **facts}

    def settings_left(self) -> list[list[str]]:
        """What follows launch.py for each trial that is not done. A Mistake if all are."""
        left = [state.trial for state in self.states if state.status != DONE]
        if not left:
            raise Mistake(f"all {len(self.states)} trials of the sweep are done → there is no job to submit; compare reads their runs")
        return [[*trial.arguments, *self._tracking(trial)] for trial in left]

    def wandb(self, factors: Sequence[Factor], program: str, settings: Sequence[str]) -> str:
        """The definition of the same sweep for `wandb sweep`, whose agents call the same launch line."""
        import yaml

        parameters: dict[str, Any] = {name: {"values": list(values)} for name, values in factors}
        parameters[SEED] = {"values": list(dict.fromkeys(state.trial.seed for state in self.states))}
        track = self.states[0].trial.experiment.track
        shared = [*settings, f"--track.group={self.loaded.name}-sweep-{self.id}", "--track.tags", *track.tags, f"sweep:{self.id}"]
        definition = {
            "name": f"{self.loaded.name}-sweep-{self.id}",
            "project": track.project,
            "method": "grid",
            "metric": {"name": METRIC, "goal": "minimize"},
            "program": program,
            "parameters": parameters,
            "command": ["${env}", *self.launcher, "${program}", *shared, "${args}"],
        }
        return yaml.safe_dump(definition, sort_keys=False)


def summary(states: Sequence[State]) -> list[tuple[str, int, float | None, float | None]]:
    """For each combination of the grid: (its settings, runs, mean of their best METRIC, standard deviation), the best mean first."""
    groups: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for state in states:
        if state.status == DONE and (best := state.best) is not None:
            groups.setdefault(state.trial.factors, []).append(best)
    rows = []
    for factors, values in groups.items():
        spread = statistics.stdev(values) if len(values) > 1 else None
        rows.append((" ".join(f"{name}={value}" for name, value in factors) or "as it is", len(values), statistics.fmean(values), spread))
    return sorted(rows, key=lambda row: row[2] if row[2] is not None else math.inf)
