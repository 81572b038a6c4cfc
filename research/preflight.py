"""What must hold before the first step: ranks that agree on what they train, and a disk that will take the first checkpoint."""

import hashlib
import json
import math
import uuid
from collections.abc import Sequence

from parallel.checkpoint_folder import free_bytes, megabytes
from parallel.engine import Engine
from parallel.errors import Mistake
from parallel.slices import slice_of
from parallel.together import everyone
from research import config, initial
from research.config import Experiment
from research.data.prepare import Corpus
from research.exams import Sat
from research.job import Job
from research.machine import git_state
from research.run_folder import RunFolder

STATE_BYTES = 12
"""Of a parameter in a checkpoint: its fp32 weight and Adam's two moments."""


def preflight(job: Job, folder: RunFolder, corpus: Corpus, engine: Engine, exams: Sequence[Sat] = ()) -> None:
    """Refuses a run that could not keep what it learns. Collective; every rank raises the same Mistake."""
    same_on_every_rank(claims(job, corpus) | {f"the data of task {sat.task.name!r}": sat.digest for sat in exams}, engine)
    room = whole_model(engine) * STATE_BYTES
    told = everyone(trouble(folder, room) if engine.grid.rank == 0 else None, engine.grid)
    if told[0]:
        raise Mistake(told[0])


def claims(job: Job, corpus: Corpus) -> dict[str, str]:
    """What every rank must say alike, and in what words."""
    commit, dirty = git_state(job.root)
    return {
        "the configuration": config_hash(job.experiment),
        "the code": f"{commit}{' and changes' if dirty else ''}",
        "the initial weights": initial.digest(job.experiment, job.root),
        "the data": json.dumps(corpus.fingerprint, sort_keys=True),
        "the seed": str(job.experiment.seed),
    }


def config_hash(experiment: Experiment) -> str:
    """SHA-256 of the resolved settings, 16 digits of it."""
    return hashlib.sha256(json.dumps(config.resolved(experiment), sort_keys=True).encode()).hexdigest()[:16]


def same_on_every_rank(mine: dict[str, str], engine: Engine) -> None:
    """A Mistake that names the first rank that says something else than rank 0, what, and both. Collective."""
    first, *others = everyone(mine, engine.grid)
    for rank, theirs in enumerate(others, 1):
        for what, said in first.items():
            if theirs.get(what) != said:
                raise Mistake(
                    f"rank {rank} disagrees about {what}: {theirs.get(what)}, rank 0 has {said} → "
                    "give all nodes the same tree, data and command"
                )


def whole_model(engine: Engine) -> int:
    """Parameters of the whole model, a tied table once. Collective."""
    mine = sum(math.prod(slice_of(parameter).shape) for name, parameter in engine.parameters.items() if engine.owns(name))
    return sum(dict(everyone((engine.grid.pipe_rank, mine), engine.grid)).values())


def trouble(folder: RunFolder, need: int) -> str | None:
    """Why the run's folder cannot take a checkpoint of `need` bytes; None where it can."""
    probe = folder.checkpoints / f".{uuid.uuid4().hex}.probe"
    try:
        probe.write_bytes(b"?")
        probe.unlink()
    except OSError as error:
        return f"{folder.checkpoints} cannot be written ({error.strerror}) → set track.runs to a folder you may write"
    free = free_bytes(folder.checkpoints)
    if free is not None and free < need:
        have = f"the disk of {folder.checkpoints} has {megabytes(free)} free"
        return f"a checkpoint needs {megabytes(need)}, {have} → make room, or set track.runs to another disk"
    return None
