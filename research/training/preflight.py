"""Checks that all ranks make together before the first step: they have met and agree, they read the same text, and the disk has room.

`meet` comes before a process group is made, `refuse_data_that_differ` once the text is prepared, `check_disk` once the model is built.
Every function is collective unless it says otherwise.
"""

import hashlib
import math
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from parallel.checkpoint.folder import MANIFEST
from parallel.engines.engine import Engine
from parallel.errors import SharedMistake
from parallel.files import FULL, free_bytes, megabytes
from parallel.grid import Grid
from parallel.object_collectives import all_gather_objects
from parallel.slices import slice_of
from research.cluster import agreement
from research.cluster.agreement import Claims
from research.cluster.exit_codes import DISK, WRONG
from research.cluster.rendezvous import Rendezvous
from research.cluster.software import experiment_files
from research.config import serialization
from research.config.diff import flatten
from research.config.experiment_folder import load_variants
from research.data.prepare import Corpus
from research.data.sources import SHARED
from research.evaluation.in_training import PreparedTask
from research.reliability.watchdog import Watchdog
from research.tracking.console import Console
from research.tracking.run_folder import RunFolder
from research.training import room
from research.training.init_from import init_from_digest
from research.training.job import Job

STATE_BYTES = 12
"""Bytes per parameter in a checkpoint: its fp32 weight and Adam's two moments."""


def meet(job: Job, console: Console, watch: Watchdog) -> tuple[Job, Mapping[str, Any], Rendezvous | None]:
    """Waits for all ranks, and refuses a launch whose ranks do not agree, before a process group or a model is made.

    Returns the job, with the warnings that concern all hosts, what it names of variant.py, and where the ranks have met: None for a
    world of one.
    """
    ranks, experiment = job.ranks, job.experiment
    if ranks.world == 1:
        return job, load_variants(job.folder, experiment), None
    with watch.progress.work("meeting the other ranks"):
        rendezvous = Rendezvous.open(ranks, experiment.watch.rendezvous_seconds, console.warn)
        with rendezvous.sharing_errors():
            rendezvous.arrive()
            variants = load_variants(job.folder, experiment)
            warnings = agreement.agree(rendezvous, claims(job, rendezvous.host))
            agreement.check_shared_folder(rendezvous, job.root / experiment.track.runs, "track.runs")
            check_shared_checkpoint(rendezvous, job)
    return replace(job, warnings=[*job.warnings, *warnings]), variants, rendezvous


def claims(job: Job, host: str) -> Claims:
    """What this rank is about to train, and with what. All ranks must claim the same."""
    return agreement.claims_of(
        job.ranks,
        host,
        settings=flatten(serialization.resolved(job.experiment)),
        options={"--resume": job.resume_option, "--rehash": job.rehash},
        weights={"the initial weights": init_from_digest(job.experiment, job.root)},
        library=job.library,
        experiment=experiment_files(job.folder),
    )


def check_shared_checkpoint(rendezvous: Rendezvous, job: Job) -> None:
    """Every rank raises a SharedMistake unless all of them see the checkpoint that rank 0 resumes from, the same one. Collective."""
    found = str(job.resume.checkpoint) if job.resume else ""
    checkpoint = rendezvous.decide("checkpoint", found, lambda values: values[0])
    if not checkpoint:
        return
    path = Path(checkpoint) / MANIFEST
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    own = Claims(job.ranks.rank, rendezvous.host, named={"checkpoint": {str(path): digest}})
    agreement.refuse_disagreement(rendezvous, "the checkpoint's manifest", own)


def data_claims(corpus: Corpus, tasks: Sequence[PreparedTask]) -> dict[str, str | None]:
    """Digests of what this rank reads, by the words for it. They are known once the text is prepared, and must be equal on all ranks."""
    return {
        **{_named("data.train", name): store.facts.get("source_sha256") for name, store in corpus.sources.items()},
        **{_named("data.validation", name): store.facts.get("source_sha256") for name, store in corpus.held_out.items()},
        "the tokenizer of data.tokenizer": corpus.tokenizer.fingerprint,
        "the prepared data": corpus.fingerprint,
        **{f"the data of task {task.task.name!r}": task.digest or None for task in tasks},
    }


def _named(setting: str, source: str) -> str:
    return f"the text of {setting}" + (f", source {source!r}" if source != SHARED else "")


def refuse_data_that_differ(own: dict[str, str | None], grid: Grid) -> None:
    """Every rank raises a SharedMistake if the data of one, `own` by name, differ from rank 0's. Collective."""
    everyone = all_gather_objects(Claims(grid.rank, socket.gethostname(), named={"data": own}), grid)
    if text := agreement.disagreement(everyone):
        raise SharedMistake(text, reports=grid.rank == 0)


def check_disk(job: Job, folder: RunFolder, engine: Engine, step: int) -> None:
    """Refuses a run that could not keep what it learns from `step` on. Every rank raises the same SharedMistake."""
    own = sum(math.prod(slice_of(parameter).shape) for name, parameter in engine.parameters.items() if engine.owns(name))
    whole_model = sum(dict(all_gather_objects((engine.grid.pipe_rank, own), engine.grid)).values())  # a tied table counts once
    trouble = disk_trouble(job, folder, whole_model * STATE_BYTES, step) if engine.grid.rank == 0 else None
    if trouble := all_gather_objects(trouble, engine.grid)[0]:
        reason, code = trouble
        raise SharedMistake(reason, reports=engine.grid.rank == 0, code=code)


def disk_trouble(job: Job, folder: RunFolder, size: int, step: int) -> tuple[str, int] | None:
    """Why the run's folder cannot take the checkpoints, of `size` bytes each, that the run keeps from `step` on, and the exit code."""
    probe = folder.checkpoints / f".{uuid.uuid4().hex}.probe"
    try:
        probe.write_bytes(b"?")
        probe.unlink()
    except OSError as error:
        reason = f"{folder.checkpoints} cannot be written ({error.strerror})"
        if error.errno in FULL:
            return f"{reason} → make room, or set track.runs to another disk", DISK
        return f"{reason} → set track.runs to a folder you may write", WRONG
    keep, schedule = job.experiment.checkpoints, job.experiment.schedule
    planned = room.planned_saves(step, schedule.steps, keep.every)
    need = room.bytes_needed(room.sizes(folder.checkpoints), planned, size, keep)
    free = free_bytes(folder.checkpoints)
    if free is not None and free < need:
        have = f"the disk of {folder.checkpoints} has {megabytes(free)} free"
        needs = f"a checkpoint needs {megabytes(size)}" + (f", and {room.describe(need, size, keep)}" if need > size else "")
        fewer = ", keep fewer" if need > size else ""
        return f"{needs}; {have} → make room{fewer}, or set track.runs to another disk", DISK
    return None
