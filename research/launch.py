"""`run(__file__)`: what every experiment's launch.py calls. Everything that can be refused is refused before torch is imported."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from parallel.errors import Mistake
from research.cluster.environment import ALONE, Ranks, choose_accelerator, find_ranks, git_state, rank_hint, refuse_taken_port
from research.cluster.exit_codes import refuse
from research.config import Experiment
from research.config.experiment_folder import load
from research.config.overrides import parse, show_help
from research.reliability.parents import follow
from research.reliability.peers import Lost
from research.training.job import dry_run, resolve


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
    job = resolve(replace(loaded, experiment=experiment), overrides, ranks, options, argv)
    if options.dry_run:
        _on_rank_0(ranks, lambda: sys.stdout.write(dry_run(job, *git_state(job.root))))
        return
    refuse_taken_port(ranks)
    choose_accelerator()  # torch begins here
    from research.training import loop

    loop.train(job, parents)


def _enough(experiment: Experiment) -> Ranks:
    """A dry run without a launcher imagines the smallest world that holds the layout."""
    world = experiment.parallel.pipe * experiment.parallel.tensor
    return replace(ALONE, world=world, local_world=world)


def _on_rank_0(ranks: Ranks, show: Callable[[], object]) -> None:
    if ranks.rank == 0:
        show()
