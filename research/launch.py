"""`run(__file__)`, which every experiment's launch.py calls: parses the command line, checks the job, trains.

What cannot work is refused before torch is imported.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from parallel.errors import Mistake
from research import ROOT
from research.cluster import rendezvous
from research.cluster.environment import (
    ALONE,
    Ranks,
    choose_accelerator,
    find_ranks,
    git_state,
    rank_hint,
    refuse_shared_accelerators,
    refuse_taken_port,
)
from research.cluster.exit_codes import refuse, refused_files
from research.cluster.software import versions
from research.config import Watch
from research.config.experiment_folder import LoadedExperiment, load
from research.config.overrides import Options, Override, parse, show_help
from research.reliability.parents import follow
from research.reliability.peers import Lost
from research.tracking.console import Console
from research.tracking.format import plural
from research.tracking.streams import flushed_output, prepare_streams
from research.training.job import Job, dry_run, resolve
from research.training.resume import NEVER


def run(file: str) -> None:
    """Train the experiment in the folder of `file`. A Mistake, wherever it is raised, ends in one sentence and exit code 2."""
    prepare_streams()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to save yet: Ctrl-C silently ends even a long import or a wait for other ranks
    try:
        with flushed_output():
            _run(Path(file).resolve(), sys.argv[1:])
    except Mistake as mistake:
        refuse(mistake, rank_hint())
    except Lost as lost:
        sys.stderr.write(f"error  {lost}\n" if str(lost) else "")
        raise SystemExit(lost.code) from None


def _run(file: Path, argv: list[str]) -> None:
    ranks = find_ranks()
    parents = follow(ranks.launcher)
    rendezvous_seconds = Watch().rendezvous_seconds  # until the experiment's own is known
    try:
        with refused_files():
            loaded = load(file.parent)
            experiment, overrides, options = parse(loaded.experiment, argv)
            rendezvous_seconds = experiment.watch.rendezvous_seconds
            job = _prepared(file, argv, ranks, replace(loaded, experiment=experiment), overrides, options)
        if job is None:
            return
        refuse_taken_port(ranks)
        starting = f"starting {job.name} on {plural(ranks.world, 'rank')} …"
        Console(quiet=ranks.rank > 0).header([("", starting)])  # the imports take seconds
        refuse_shared_accelerators(ranks, choose_accelerator())  # torch begins here
    except Mistake as mistake:  # of this rank, perhaps of this host alone
        if ranks.world > 1 and not {"--dry-run", "--dry_run"} & {*argv}:
            rendezvous.report_before_meeting(ranks, mistake, rendezvous_seconds)
        raise
    if "--check-cluster" in argv or "--check_cluster" in argv:
        from research.training import cluster_check

        cluster_check.check_cluster(job, parents)
        return
    from research.training import loop

    loop.train(job, parents)


def _prepared(
    file: Path, argv: list[str], ranks: Ranks, loaded: LoadedExperiment, overrides: list[Override], options: Options
) -> Job | None:
    """The checked job; None if the command line only asks for help, the version or a dry run, which rank 0 has then shown."""
    experiment = loaded.experiment
    if options.help:
        if ranks.rank == 0:
            show_help(experiment, os.path.relpath(file), options.help_group)
        return None
    if options.version:
        if ranks.rank == 0:
            sys.stdout.write(versions(ROOT) + "\n")
        return None
    if options.dry_run and ranks == ALONE:  # a dry run without a launcher assumes the smallest world that holds the layout
        world = experiment.parallel.pipe * experiment.parallel.tensor
        ranks = replace(ALONE, world=world, local_world=world)
    searched = replace(options, resume=NEVER) if options.check_cluster else options  # nothing is resumed
    job = replace(resolve(loaded, overrides, ranks, searched, argv), resume_option=options.resume)
    if options.dry_run:
        if ranks.rank == 0:
            sys.stdout.write(dry_run(job, *git_state(job.root)))
        return None
    return job
