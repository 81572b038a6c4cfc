"""The run that a verb uses: found, checked, one of its checkpoints chosen. Before torch is imported."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from models.config import GPT
from parallel.checkpoint import folder as checkpoint_folder
from parallel.errors import Mistake, listed
from research.cluster.environment import find_ranks
from research.config import Experiment, serialization
from research.config.checks import tensor_degrees
from research.config.experiment_folder import check_variants
from research.tracking import run_folder
from research.tracking.run_folder import RunFolder


@dataclass(frozen=True)
class Trained:
    """A command's words, and the run that they name. A verb's own task adds to it."""

    arguments: argparse.Namespace
    folder: RunFolder
    checkpoint: Path
    experiment: Experiment


def find(arguments: argparse.Namespace) -> Trained:
    """The run of `run`, `checkpoint` and `tensor`. A Mistake where there is none, or it cannot be sliced so."""
    folder = run_folder.find(arguments.run)
    experiment = serialization.load(folder.config)
    check_variants(folder.source, experiment.model)
    refuse_tensor(arguments.tensor, experiment.model)
    return Trained(arguments, folder, checkpoint_of(folder, arguments.checkpoint), experiment)


def refuse_launcher(verb: str) -> None:
    """A Mistake where a launcher has started several ranks of a verb that starts its own."""
    if find_ranks().world > 1:
        raise Mistake(f"{verb} starts its ranks itself → run it without a launcher: python -m research {verb} RUN --tensor 2")


def say(what: str) -> None:
    """Slow work: the tokenizer is being made again, because nothing has kept it."""
    sys.stderr.write(f"{what} …\n")


def refuse_tensor(tensor: int, model: GPT) -> None:
    """A Mistake where so many ranks cannot share the model."""
    if tensor not in (works := tensor_degrees(model)):
        shape = f"model.num_heads = {model.num_heads}, num_kv_heads = {model.num_kv_heads} and ffn_size = {model.ffn_size}"
        raise Mistake(f"--tensor {tensor} does not fit {shape} → use {listed(works[:8])}")


def checkpoint_of(folder: RunFolder, step: int | None) -> Path:
    """The checkpoint of a step, None: the newest."""
    if step is None:
        return checkpoint_folder.latest(folder.checkpoints)
    found = {checkpoint_folder.step_of(path): path for path in checkpoint_folder.steps(folder.checkpoints)}
    if step not in found:
        raise Mistake(f"{folder.title} has no checkpoint of step {step} → it has {listed(found, 'and') or 'none'}")
    return found[step]
