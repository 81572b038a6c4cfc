"""`run(__file__)`: what every experiment's launch.py calls. Everything that can be refused is refused before torch is imported."""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from parallel.deepspeed_config import EngineSettings, derive
from parallel.errors import Mistake
from research.checks import check
from research.command_line import Options, parse, show_help
from research.config import Experiment
from research.data.prepare import check as check_data
from research.dry_run import dry_run
from research.exams import check as check_exams
from research.experiment import Loaded, check_variants, load
from research.initial import check as check_initial
from research.job import Job, Override
from research.layout import engine_settings, layout
from research.machine import ALONE, Ranks, choose_accelerator, find_ranks, git_state, rank_hint, refuse_taken_port
from research.parents import follow
from research.peers import Lost
from research.resume import find
from research.samples import check as check_samples

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 20.0
"""Seconds that ranks > 0 leave to rank 0 to say what is wrong, before its exit makes the launcher end them."""
WRONG = 2
"""Exit code of a Mistake."""


def run(file: str) -> None:
    """Train the experiment that `file` lies in. A Mistake, from wherever, ends in one sentence and exit code 2."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to save yet: Ctrl-C ends even a long import or a wait for other ranks, silently
    try:
        _run(Path(file).resolve(), sys.argv[1:])
        sys.stdout.flush()  # here, where a reader that has left can still be told from an error
    except Mistake as mistake:
        refuse(mistake, rank_hint())
    except Lost as lost:
        sys.stderr.write(f"error  {lost}\n" if str(lost) else "")
        raise SystemExit(lost.code) from None
    except BrokenPipeError:  # `--help | head` has seen enough; keep Python from complaining about it when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(file: Path, argv: list[str]) -> None:
    ranks = find_ranks()
    parents = follow(ranks.launcher)
    loaded = load(file.parent)
    experiment, overrides, options = parse(loaded.experiment, argv)
    if options.help:
        _on_rank_0(ranks, lambda: show_help(experiment, os.path.relpath(file)))
        return
    if options.dry_run and ranks == ALONE:
        ranks = _enough(experiment)
    job = resolved(replace(loaded, experiment=experiment), overrides, ranks, options, argv)
    if options.dry_run:
        _on_rank_0(ranks, lambda: sys.stdout.write(dry_run(job, *git_state(job.root))))
        return
    refuse_taken_port(ranks)
    choose_accelerator()  # torch begins here
    from research import train

    train.train(job, parents)


def _enough(experiment: Experiment) -> Ranks:
    """A dry run without a launcher imagines the smallest world that holds the layout."""
    world = experiment.parallel.pipe * experiment.parallel.tensor
    return replace(ALONE, world=world, local_world=world)


def resolved(loaded: Loaded, overrides: list[Override], ranks: Ranks, options: Options, argv: list[str]) -> Job:
    """Everything that can be checked without torch, checked; then the job."""
    experiment = loaded.experiment
    check(experiment, ranks)
    check_variants(loaded.folder, experiment.model)
    check_data(experiment.data, ROOT, experiment.model.vocab_size)
    check_initial(experiment, ROOT)
    check_exams(experiment, ROOT)
    check_samples(experiment, ROOT)
    found = layout(experiment, ranks.world)
    _check_table(engine_settings(experiment, found))
    return Job(
        experiment=experiment,
        folder=loaded.folder,
        name=loaded.name,
        overrides=overrides,
        ranks=ranks,
        layout=found,
        root=ROOT,
        verbose=options.verbose,
        argv=argv,
        resume=find(options.resume, experiment, loaded.folder, ROOT / experiment.track.runs) if ranks.rank == 0 else None,
    )


def _check_table(settings: EngineSettings) -> None:
    """Refuse a deepspeed={…} that contradicts the experiment on a CPU and on a GPU: which one this is, only torch knows."""
    try:
        derive(settings, cuda=False)
    except Mistake:
        derive(settings, cuda=True)


def refuse(mistake: Mistake, rank: int, patience: float = PATIENCE) -> None:
    """Say it on rank 0 and leave. Others wait: a launcher that sees them leave first would end rank 0 unheard.

    One that is still there after `patience` seconds was not ended by a rank 0 that knew, so it speaks for itself.
    """
    if rank > 0:
        time.sleep(patience)
    who = f"(rank {rank}) " if rank > 0 else ""
    sys.stderr.write(f"error  {who}{mistake}\n")
    sys.stderr.flush()
    raise SystemExit(WRONG)


def _on_rank_0(ranks: Ranks, show: Callable[[], object]) -> None:
    if ranks.rank == 0:
        show()
