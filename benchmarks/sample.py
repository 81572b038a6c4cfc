"""What a sample on the way costs, in optimizer steps of the same experiment: CPU time of both, taken in turns in one process.

    python benchmarks/sample.py [experiments/gpt_sotu] [--pipe 1] [--tensor 1] [--tokens 16] [--prompt 8] [--repetitions 5]

CPU time does not depend on what else the machine does, but for its caches; ranks that wait for each other spend some of it, too.
A sample is one text: a few texts cost as much in a pipeline, whose passes have one shape, and more elsewhere.
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist

from models import architectures
from parallel.engines.engine import Engine, make_engine
from parallel.engines.micro_batch import MicroBatch
from parallel.grid import make_grid
from research.cli.verbs import count
from research.cluster import forked_ranks
from research.cluster.environment import ALONE
from research.cluster.exit_codes import refusing
from research.config import Experiment
from research.config.checks import check
from research.config.experiment_folder import load, load_variants
from research.config.layout import engine_settings, layout
from research.training.components import optimizer_class, training_loss
from research.training.live_model import Live, LiveDecoder


def engine_of(experiment: Experiment, folder: Path) -> Engine:
    """As a run builds it."""
    cut = experiment.parallel
    grid = make_grid(cut.pipe, cut.tensor, cut.sequence)
    variants = load_variants(folder, experiment)
    layers = architectures.layers(experiment.model, grid, experiment.seed, variants, cut.recompute)
    settings = engine_settings(experiment, layout(experiment, dist.get_world_size()), optimizer_class(experiment, variants))
    return make_engine(layers, training_loss(experiment, grid.tensor_group, variants), grid, settings)


def batches(experiment: Experiment, count: int) -> Iterator[MicroBatch]:
    """A step's micro-batches of random tokens."""
    shape = (experiment.schedule.micro_batch_size, experiment.model.seq_length)
    tokens = torch.randint(0, experiment.model.vocab_size, (shape[0], shape[1] + 1), generator=torch.Generator().manual_seed(0))
    labels, context = (tokens[:, 1:], torch.full(shape, 1 / (shape[0] * shape[1]))), {"samples": torch.arange(shape[0])}
    for _ in range(count):
        yield MicroBatch(tokens[:, :-1], labels, context)


def written(live: Live, prompt: int, tokens: int) -> None:
    """One greedy text."""
    decoder = LiveDecoder(live)
    logits = decoder.admit([range(prompt)])
    for _ in range(tokens - 1):
        logits = decoder.step([int(logits[0].argmax())])


def seconds(act: Callable[[], object]) -> float:
    """CPU time of this rank."""
    before = time.process_time()
    act()
    return time.process_time() - before


def measure(experiment: Experiment, source: Path, prompt: int, tokens: int, repetitions: int, folder: Path) -> None:
    """On a rank: pairs of (step, sample) in seconds, into a file of its own."""
    engine = engine_of(experiment, source)
    live, count = Live(engine, experiment.model), engine.settings.micro_batches
    pairs = []
    for _ in range(repetitions + 1):
        step = seconds(lambda: engine.train_batch(batches(experiment, count), 1e-4))
        pairs.append((step, seconds(lambda: written(live, prompt, tokens))))
    np.savetxt(folder / f"{dist.get_rank()}.txt", pairs[1:])  # memory is allocated and kernels are chosen in the first


def main() -> None:
    """Parses the arguments, prints a line a rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", default=str(Path(__file__).resolve().parents[1] / "experiments" / "gpt_sotu"))
    for name, value in (("pipe", 1), ("tensor", 1), ("tokens", 16), ("prompt", 8), ("repetitions", 5)):
        parser.add_argument(f"--{name}", type=count, default=value)
    arguments = parser.parse_args()
    loaded = load(Path(arguments.experiment))
    experiment = loaded.experiment
    experiment.parallel.pipe, experiment.parallel.tensor = arguments.pipe, arguments.tensor
    world = arguments.pipe * arguments.tensor
    check(experiment, replace(ALONE, world=world, local_world=world))
    asked = (experiment, loaded.folder, arguments.prompt, arguments.tokens, arguments.repetitions)
    with tempfile.TemporaryDirectory() as folder:
        forked_ranks.run(functools.partial(measure, *asked), arguments.pipe * arguments.tensor, Path(folder))
        for path in sorted(Path(folder).glob("[0-9]*.txt")):
            steps, samples = np.loadtxt(path, ndmin=2).T
            print(
                f"rank {path.stem}: a step {statistics.median(steps):.3f} s, a sample of {arguments.tokens} tokens "
                f"{statistics.median(samples):.3f} s = {statistics.median(samples / steps):.2f} steps"
            )


if __name__ == "__main__":
    with refusing():
        main()
