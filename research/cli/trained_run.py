"""Finds and checks the trained run and the checkpoint that `generate`, `evaluate` and `serve` use. Imports no torch."""

import argparse
import sys
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from parallel.checkpoint import folder as checkpoint_folder
from parallel.errors import Mistake, listed
from parallel.text import printable
from research import ROOT
from research.cluster.environment import find_ranks
from research.config import Experiment
from research.config.checks import tensor_degrees
from research.config.experiment_folder import VARIANTS, check_variants
from research.exchange.limited_tokenizer import try_tokenizer
from research.generation.trust import WAY_OUT, executed_names, is_known_variant, said_of_trust, trusted_settings
from research.tracking import run_folder, run_status
from research.tracking.console import Advance, Console
from research.tracking.own_runs import is_own
from research.tracking.run_folder import RunFolder


@dataclass(frozen=True)
class Trained:
    """The parsed arguments of a verb, and the run that they name. Base class of a verb's own checked command."""

    arguments: argparse.Namespace
    folder: RunFolder
    checkpoint: Path
    experiment: Experiment


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Adds --trust."""
    text = "the run is yours, or you have looked at it: use what its config.json names, and execute its variant.py"
    parser.add_argument("--trust", action="store_true", help=f"{text}; needed once, and not for runs that this checkout has made")


def settings_of_run(arguments: argparse.Namespace, folder: RunFolder, reads: Collection[str] = (), trains: bool = False) -> Experiment:
    """The run's settings, without what a stranger's run may not decide (`trusted_settings`). With --trust, the run counts as own now.

    A tokenizer.json of a run that is not own has been tried in a child process with limits.
    """
    experiment = trusted_settings(folder, arguments.trust, reads, trains)
    if is_own(folder):
        return experiment
    if not arguments.trust:
        try_tokenizer(experiment.data.tokenizer, ROOT, WAY_OUT)
        return experiment
    console, path = Console(sys.stderr), folder.source / VARIANTS
    if executed_names(experiment, trains) and path.is_file() and not is_known_variant(path):
        console.warn(f"{path} is executed: no experiment of this checkout has the same")
    console.header([("trusted", said_of_trust(folder))])
    return experiment


def find(arguments: argparse.Namespace, reads: Collection[str] = ()) -> Trained:
    """The run, checkpoint and tensor degree that `arguments` name (`run`; `checkpoint`, None: the newest; `tensor`; `trust`).

    `reads`: the texts of the run that are needed, besides what its tokenizer is made from. Raises a Mistake if the run or the
    checkpoint does not exist, the model cannot be sliced over so many ranks, or the run is a stranger's and names files of this machine.
    """
    folder = find_run(arguments.run)
    experiment = settings_of_run(arguments, folder, reads)
    model = experiment.model
    check_variants(folder.source, model)
    if arguments.tensor not in (degrees := tensor_degrees(model)):
        shape = f"model.num_heads = {model.num_heads}, num_kv_heads = {model.num_kv_heads} and ffn_size = {model.ffn_size}"
        raise Mistake(f"--tensor {arguments.tensor} does not fit {shape} → use {listed(degrees[:8])}")

    if arguments.checkpoint is None:
        return Trained(arguments, folder, checkpoint_folder.latest(folder.checkpoints), experiment)
    checkpoints = {checkpoint_folder.step_of(path): path for path in checkpoint_folder.steps(folder.checkpoints)}
    if arguments.checkpoint not in checkpoints:
        steps = listed(checkpoints, "and") or "none"
        raise Mistake(f"{folder.title} has no checkpoint of step {arguments.checkpoint} → it has {steps}")
    return Trained(arguments, folder, checkpoints[arguments.checkpoint], experiment)


def find_run(handle: str) -> RunFolder:
    """The run that `handle` names. If it leaves open which one, as an experiment's name does, standard error says which was chosen."""
    folder = run_folder.find(handle)
    say_choice(handle, folder)
    return folder


def say_choice(handle: str, folder: RunFolder) -> None:
    """Says on standard error which run was chosen for `handle`, unless it names that run itself."""
    if choice := run_status.choice(handle, folder):
        sys.stderr.write(f"{printable(choice)}\n")


def refuse_launcher(verb: str) -> None:
    """Raises a Mistake if a launcher has started several ranks of a verb that starts its own ranks."""
    if find_ranks().world > 1:
        raise Mistake(f"{verb} starts its ranks itself → run it without a launcher: python -m research {verb} RUN --tensor 2")


def say(what: str) -> AbstractContextManager[Advance]:
    """Shows slow work on standard error, such as training a tokenizer that is not in the cache."""
    return Console(sys.stderr).progress(what, unit="characters")
