"""Replay: runs one step of a run again in one process, to find the first module, gradient or parameter that is not finite.

`replay` restores the weights from before the step, on whatever layout they were saved; `find_non_finite` takes the step's
micro-batches through a plain module and looks at every output and gradient.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import architectures
from parallel import distributed
from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.load import load_checkpoint, load_initial
from parallel.engines.engine import make_engine
from parallel.engines.micro_batch import MicroBatch
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import PlainModule, unique_parameters
from research import ROOT
from research.config import Experiment, Parallel
from research.config.experiment_folder import load_variants
from research.config.layout import engine_settings, layout
from research.data import prepare
from research.data.prepare import Corpus
from research.tracking.console import Console
from research.tracking.run_folder import RunFolder
from research.training import anomalies
from research.training.components import optimizer_class, training_loss
from research.training.init_from import init_from_path
from research.training.sampler import context_of, sampler_of
from research.training.schedule import learning_rate

Loss = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]


@dataclass(frozen=True)
class FirstNonFinite:
    """The first thing that is not finite in one phase of a step."""

    phase: str
    """weights, forward, loss or backward."""
    name: str
    """The name of a layer or module, or the logical name of a parameter."""
    micro_batch: int
    """Counted from 0."""
    rows: tuple[int, ...]
    """The rows of the micro-batch that are concerned; empty where rows mean nothing."""
    what: str
    """'3 of 512 values'."""


@dataclass(frozen=True)
class Examined:
    """What a whole step in one process showed."""

    culprits: list[FirstNonFinite]
    """The first of each phase that has one, in order of time."""
    loss: float
    grad_norm: float


def replay(folder: RunFolder, experiment: Experiment, step: int, console: Console) -> tuple[Corpus, Examined]:
    """Runs step `step` (from 1) of the run again; `console` shows from where. Returns the run's text and what was found."""
    if step < 1:
        raise Mistake(f"--step {step} is not a step → count from 1, as the rows of metrics.jsonl do")
    checkpoint, taken = start_of(folder, step)
    again = f"{step - 1 - taken} steps trained again" if taken < step - 1 else "no step in between"
    start = checkpoint.name if checkpoint else "the initial weights"
    console.header([("", f"replay {folder.title} · step {step} · from {start}, {again}")])
    corpus = prepare.load(experiment.data, ROOT, experiment.model.vocab_size)
    module, scale = module_before(folder, experiment, corpus, checkpoint, taken, step, console)
    variants = load_variants(folder.source, experiment)
    loss = training_loss(experiment, None, variants)
    return corpus, find_non_finite(module, loss, batches(experiment, corpus, variants, step), scale)


def start_of(folder: RunFolder, step: int) -> tuple[Path | None, int]:
    """(checkpoint or None, the steps it has taken): the nearest that leads to the weights from before the step.

    A step that was not applied left its weights as they were, so the checkpoint made right after it will do.
    """
    complete = {checkpoint_folder.step_of(path): path for path in checkpoint_folder.steps(folder.checkpoints)}
    skipped = anomalies.path_of(folder, step).is_file() and anomalies.load(folder, step).kind == anomalies.NON_FINITE
    if skipped and step in complete:
        return complete[step], step - 1
    taken = max((taken for taken in complete if taken < step), default=0)
    return complete.get(taken), taken


def module_before(
    folder: RunFolder, experiment: Experiment, corpus: Corpus, checkpoint: Path | None, taken: int, step: int, console: Console
) -> tuple[PlainModule, float]:
    """A plain module with the weights from before `step`, in the run's precision, and the loss scale. Trains the steps in between."""
    model, variants = experiment.model, load_variants(folder.source, experiment)
    alone = experiment.model_copy(update={"parallel": Parallel()})
    loss = training_loss(experiment, None, variants)
    if experiment.deterministic:
        distributed.use_deterministic_kernels()
    distributed.start(0, 1, 0, None)
    try:
        layers = architectures.layers(model, Grid(), experiment.seed, variants, context=context_of(experiment, variants))
        on_one_rank = layout(alone, 1)
        settings = engine_settings(alone, on_one_rank, optimizer_class(experiment, variants))
        engine = make_engine(layers, loss, Grid(), settings)
        if checkpoint is not None:
            load_checkpoint(checkpoint, engine)
        elif path := init_from_path(experiment, ROOT):
            load_initial(path, engine)
        with console.progress("steps in between", step - 1 - taken) as advance:
            for before in range(taken, step - 1):
                lr = learning_rate(before, experiment.optimizer, experiment.schedule.steps, variants)
                engine.train_batch(batches(experiment, corpus, variants, before + 1), lr, on_one_rank.micro_batches_of(before))
                advance()

        module = PlainModule(architectures.layers(model, Grid(), experiment.seed, variants, context=context_of(experiment, variants)))
        weights = dict(engine.full_weights())
        with torch.no_grad():
            for name, parameter in unique_parameters(module):
                parameter.copy_(weights[name])
        return module.to(distributed.PRECISIONS[experiment.precision]), float(getattr(engine.optimizer, "loss_scale", None) or 1.0)
    finally:
        distributed.stop()


def batches(experiment: Experiment, corpus: Corpus, variants: Mapping[str, Any], step: int) -> list[MicroBatch]:
    """All micro-batches of a step (from 1), as one data rank would take them."""
    found = sampler_of(experiment, corpus, variants).micro_batches(step - 1, data_rank=0, data_size=1)
    return [MicroBatch.of(batch.ids, batch.labels, batch.context) for batch in found]


def find_non_finite(module: PlainModule, loss: Loss, batches: Iterable[MicroBatch], scale: float = 1.0) -> Examined:
    """Takes one step's micro-batches forward and backward; gradients accumulate in the module. fp16 needs `scale`, of the loss."""
    culprits = [_parameter("weights", name, p) for name, p in unique_parameters(module) if not p.isfinite().all()][:1]
    total, count = 0.0, 0
    for i, batch in enumerate(batches):
        seen: list[FirstNonFinite] = []
        # every module without modules of its own: its output, and the gradient that comes back to it
        leaves = [(name, part) for name, part in module.named_modules() if name and not any(part.children())]
        hooks = [part.register_forward_hook(_hook(name, i, seen)) for name, part in leaves]
        value = loss(module(batch.inputs(module.context)), batch.labels)
        (value * scale).backward()
        for hook in hooks:
            hook.remove()
        if not value.isfinite():
            seen.append(FirstNonFinite("loss", "loss", i, (), str(value.item())))
        culprits += seen
        total, count = total + value.item(), count + 1

    gradients = [(name, parameter.grad) for name, parameter in unique_parameters(module) if parameter.grad is not None]
    culprits += [_parameter("backward", name, gradient) for name, gradient in gradients if not gradient.isfinite().all()][:1]
    norm = torch.stack([gradient.float().norm() / scale for _, gradient in gradients]).norm()
    # the first of each phase; of the backward pass, the layer where it shows first and the parameter
    first: dict[tuple[str, bool], FirstNonFinite] = {}
    for culprit in culprits:
        first.setdefault((culprit.phase, culprit.name.endswith((".weight", ".bias"))), culprit)
    return Examined(list(first.values()), total / max(count, 1), float(norm) / max(count, 1))


def _hook(name: str, micro_batch: int, seen: list[FirstNonFinite]) -> Callable[..., None]:
    """A forward hook that notes in `seen` where the output of module `name`, or its gradient, is not finite."""

    def note(phase: str, values: Tensor) -> None:
        if not (wild := ~values.isfinite()).any():
            return
        rows = tuple(int(row) for row in wild.flatten(1).any(1).nonzero().flatten()) if values.dim() > 1 else ()
        seen.append(FirstNonFinite(phase, name, micro_batch, rows, f"{int(wild.sum())} of {values.numel()} values"))

    def hook(module: nn.Module, inputs: Any, y: Any) -> None:
        if isinstance(y, Tensor):
            note("forward", y)
            if y.requires_grad:
                y.register_hook(lambda gradient: note("backward", gradient))

    return hook


def _parameter(phase: str, name: str, values: Tensor) -> FirstNonFinite:
    return FirstNonFinite(phase, name, 0, (), f"{int((~values.isfinite()).sum())} of {values.numel()} values")
