"""The real training loop on forked ranks of this machine, in small: an experiment's structure and code, a little text, a few steps.

What `launch.py` does, without the seconds that an interpreter and its imports take: for `torture` and for tests.
"""

import contextlib
import gc
import itertools
import os
import socket
import sys
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from research import ROOT
from research.cluster import forked_ranks
from research.cluster.environment import LOCALHOST, Ranks
from research.config import Experiment, serialization
from research.config.experiment_folder import LoadedExperiment
from research.data import documents
from research.tracking.run_folder import RunFolder, every

CHARACTERS = 40_000
"""Of the training text."""
SIZES: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 64, "vocab_size": 391, "seq_length": 16},
    "schedule": {"steps": 12, "batch_size": 8, "micro_batch_size": 2, "validate_every": 0, "log_every": 1},
    "checkpoints": {"every": 3},
    "evaluate": {"every": 0},
    "sample": {"every": 0},
    "track": {"mode": "disabled"},
}
"""What is small, or left out: tasks and prompts are not made for so short a context.

Grouped queries, where the experiment has them, stay grouped; a vocabulary that no tensor degree divides."""


def small(loaded: LoadedExperiment, place: Path, changes: dict[str, dict[str, Any]] | None = None) -> LoadedExperiment:
    """The experiment with small sizes and a small text of `place`, whose run folders go to `place`/runs."""
    settings = serialization.resolved(loaded.experiment)
    del settings["schema"]
    texts = {name: str(place / f"{name}.txt") for name in ("train", "validation")}
    data = {"data": texts | {"tokenizer": "builtin:bpe-384", "cache": str(place / "cache")}, "track": {"runs": str(place / "runs")}}
    for group, values in itertools.chain(SIZES.items(), data.items(), (changes or {}).items()):
        settings[group] = settings[group] | values if isinstance(values, dict) else values
    if loaded.experiment.model.num_kv_heads == loaded.experiment.model.num_heads:
        settings["model"]["num_kv_heads"] = settings["model"]["num_heads"]
    settings["optimizer"]["warmup_steps"] = min(4, settings["optimizer"]["warmup_steps"])
    return LoadedExperiment(serialization.build(settings), loaded.folder, loaded.name)


def write_texts(loaded: LoadedExperiment, place: Path) -> None:
    """The beginning of the experiment's own training text, and of its held-out one."""
    place.mkdir(parents=True, exist_ok=True)
    for name, most in (("train", CHARACTERS), ("validation", CHARACTERS // 20)):
        text, source = "", documents.documents(getattr(loaded.experiment.data, name), ROOT)
        while len(text) < most and (document := next(source, None)) is not None:
            text += document[: most - len(text)]
        (place / f"{name}.txt").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Start:
    """One start of the ranks: of what, on how many, and whether it goes on with a run."""

    loaded: LoadedExperiment
    world: int
    output: Path
    """The file that takes what the ranks say."""
    resume: str = "never"
    prelude: Any = None
    """Called on every rank before it trains, with its number: tests break things here. At module level."""
    port: int = field(default_factory=lambda: free_port())


def begin(start: Start) -> list[ForkServerProcess]:
    """The ranks, under way."""
    settings = serialization.resolved(start.loaded.experiment)
    told = (settings, str(start.loaded.folder), start.loaded.name, start.world, start.port, start.resume, str(start.output), start.prelude)
    return forked_ranks.start(_rank, [(rank, *told) for rank in range(start.world)])


def newest(experiment: Experiment) -> RunFolder:
    """The newest run folder that the rehearsals of an experiment have made."""
    return max(every(Path(experiment.track.runs)), key=lambda folder: folder.run.stat().st_mtime)


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        return probe.getsockname()[1]


def _rank(rank: int, settings: dict, folder: str, name: str, world: int, port: int, resume: str, output: str, prelude: Any) -> None:
    """A rank's whole life. Its exit code is what launch.py's would be."""
    gc.freeze()  # the server's objects are nobody's garbage
    _speak_into(Path(output))
    del settings["schema"]
    loaded = LoadedExperiment(serialization.build(settings), Path(folder), name)
    own = Ranks(rank, rank, world, world, "deepspeed" if world > 1 else "python", LOCALHOST, port, cores=1)
    if prelude is not None:
        prelude(rank)
    from research.cluster.exit_codes import WRONG
    from research.config import overrides
    from research.reliability.parents import Parents
    from research.reliability.peers import Lost
    from research.training import loop
    from research.training.job import resolve

    try:
        loop.train(resolve(loaded, [], own, overrides.Options(resume=resume), []), Parents("python"))
    except Lost as lost:
        sys.stderr.write(f"error  (rank {rank}) {lost}\n")
        raise SystemExit(1) from None
    except Mistake as mistake:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"error  (rank {rank}) {mistake}\n")
        raise SystemExit(WRONG) from None


def _speak_into(output: Path) -> None:
    """Standard output and error of this process, appended to one file."""
    with output.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
