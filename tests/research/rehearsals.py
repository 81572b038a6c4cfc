"""Small real runs on forked ranks for tests of resuming, and what can be done to them on the way."""

import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from research import metrics, ranks, rehearsal
from research.experiment import Loaded, load
from research.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
DROPS = {f"{place}_dropout": 0.1 for place in ("embedding", "residual", "mlp", "attention")}
LIMIT = 240.0
"""Seconds until a rehearsal is killed; on two idle cores one takes two to five."""


@dataclass(frozen=True)
class Ended:
    """One start that is over: the ranks' exit codes, what they said, the run's folder."""

    codes: list[int]
    said: str
    folder: RunFolder

    def rows(self, key: str = "train/loss") -> dict[int, float]:
        """step -> value, a step's last where it has several."""
        return {row["progress/step"]: row[key] for row in metrics.read(self.folder.metrics) if key in row}

    def hexes(self, key: str = "train/loss") -> dict[int, str]:
        """The same, as hexadecimal floats."""
        return {step: float(value).hex() for step, value in self.rows(key).items()}


class Stage:
    """A place with small texts, where runs of one experiment are rehearsed; `name` keeps their folders apart."""

    def __init__(self, place: Path, experiment: str = "gpt_sotu") -> None:
        self.place, self.loaded = place, load(ROOT / "experiments" / experiment)
        rehearsal.write_texts(self.loaded, place)

    def small(self, name: str, changes: dict[str, Any]) -> Loaded:
        return rehearsal.small(self.loaded, self.place, {**changes, "track": {"runs": str(self.place / name), **changes.get("track", {})}})

    def run(self, name: str, world: int = 1, resume: str = "never", prelude: Callable[[int], None] | None = None, **changes: Any) -> Ended:
        """One start to its end. `changes`: settings by group, e.g. parallel={"tensor": 2}."""
        loaded, output = self.small(name, changes), self.place / f"{name}.txt"
        before = output.stat().st_size if output.exists() else 0
        under_way = rehearsal.begin(rehearsal.Start(loaded, world, output, resume, prelude))
        try:
            for process in under_way:
                process.join(LIMIT)
            codes = [-1 if process.exitcode is None else process.exitcode for process in under_way]
        finally:
            ranks.end(under_way)
        said = output.read_bytes()[before:].decode(errors="replace")
        return Ended(codes, said, rehearsal.newest(loaded.experiment))


def bits(folder: RunFolder) -> dict[str, bytes]:
    """Every tensor of the newest checkpoint as bytes, by file key, read with safetensors alone; files of one layout only."""
    newest = folder.checkpoints / (folder.checkpoints / "latest").read_text()
    found = {}
    for file in sorted(newest.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {f"{file.name.partition('-')[0]} {key}": opened.get_tensor(key).numpy().tobytes() for key in opened.keys()}  # noqa: SIM118
    return found


# What can happen to a rank. Preludes: called on every rank before it trains.


def _before_step(rank: int, number: int, act: Callable[[Any], None]) -> None:
    from research import train

    step = train.one_step

    def one_step(run: Any) -> None:
        if run.step + 1 == number:
            act(run)
        step(run)

    train.one_step = one_step


def stopped_in_step_6(rank: int) -> None:
    """SIGUSR1 while step 6 is taken, to one rank: all stop after it."""
    if rank == 0:
        _before_step(rank, 6, lambda run: os.kill(os.getpid(), signal.SIGUSR1))


def killed_in_step_8(rank: int) -> None:
    """SIGKILL of the last rank to begin step 8; on two ranks the other is ended by the harness."""
    _before_step(rank, 8, lambda run: os.kill(os.getpid(), signal.SIGKILL))


def nan_gradient_in_step_5(rank: int) -> None:
    """On rank 1 alone, one parameter's gradient is NaN in step 5."""

    def poison(run: Any) -> None:
        parameter = run.engine.parameters["blocks.1.mlp.up.weight"]
        seen: list[bool] = []

        def spoiled(gradient):
            seen.append(True)
            return gradient * math.nan if len(seen) == 1 else gradient

        run.poisoned = parameter.register_hook(spoiled)
        run.suspects = type(run.suspects)(run.engine.parameters, run.engine.device)  # hooks run in the order they were made in

    if rank == 1:
        _before_step(rank, 5, poison)
        _before_step(rank, 6, lambda run: run.poisoned.remove())


def nan_from_step_5_on(rank: int) -> None:
    """Every step's loss is NaN from the fifth on, on every rank."""
    from research import train

    make = train.micro_batch

    def weights_of_nan(batch, numbered):
        made = make(batch, numbered)
        return made._replace(weights=made.weights * math.nan) if train.steps_seen >= 5 else made

    step = train.one_step
    train.steps_seen = 0

    def one_step(run: Any) -> None:
        train.steps_seen = run.step + 1
        step(run)

    train.one_step, train.micro_batch = one_step, weights_of_nan
