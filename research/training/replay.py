"""`python -m research replay RUN --step N`: a step again, in one process, to see where it first is not finite."""
# MERGED-DOC """Where does a step first stop being finite? Its micro-batches through a plain module, every output and gradient looked at."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import gpt
from parallel import distributed
from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.load import load_checkpoint, load_initial
from parallel.engines.engine import Engine, MicroBatch, make_engine
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import PlainModule, unique_parameters
from research import ROOT
from research.cluster.environment import choose_accelerator
from research.config import Experiment, Parallel
from research.config.experiment_folder import load_variants
from research.config.layout import engine_settings, layout
from research.data import prepare
from research.data.batches import train_micro_batches
from research.data.prepare import Corpus
from research.tracking.console import Console
from research.tracking.run_folder import RunFolder
from research.training import anomalies, resume
from research.training.schedule import learning_rate

Loss = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]


@dataclass(frozen=True)
class FirstNonFinite:
    """The first thing that is not finite: where, in which micro-batch (from 0), which of its rows, what."""

    phase: str
    """weights, forward, loss or backward."""
    name: str
    """A layer's or module's name, or a logical parameter's."""
    micro_batch: int
    rows: tuple[int, ...]
    what: str
    """'3 of 512 values'."""


@dataclass(frozen=True)
class Examined:
    """A whole step in one process."""

    culprits: list[FirstNonFinite]
    """The first of each phase that has one, in order of time."""
    loss: float
    grad_norm: float


def find_non_finite(module: PlainModule, loss: Loss, batches: Iterable[MicroBatch], scale: float = 1.0) -> Examined:
    """Forward and backward of one step; gradients accumulate in the module. `scale`: of the loss, as fp16 needs it."""
    culprits = [_parameter("weights", name, p, 0) for name, p in unique_parameters(module) if not _finite(p)][:1]
    total, count = 0.0, 0
    for i, batch in enumerate(batches):
        seen: list[FirstNonFinite] = []
        hooks = _watched(module, i, seen)
        value = loss(module(batch.inputs()), (batch.targets, batch.weights))
        (value * scale).backward()
        for hook in hooks:
            hook.remove()
        if not _finite(value):
            seen.append(FirstNonFinite("loss", "loss", i, (), str(value.item())))
        culprits += seen
        total, count = total + value.item(), count + 1
    culprits += [_parameter("backward", name, p.grad, 0) for name, p in _with_gradient(module) if not _finite(p.grad)][:1]
    norm = torch.stack([p.grad.float().norm() / scale for _, p in _with_gradient(module)]).norm()
    return Examined(_first_of_each(culprits), total / max(count, 1), float(norm) / max(count, 1))


def _first_of_each(culprits: list[FirstNonFinite]) -> list[FirstNonFinite]:
    """The first of each phase; of a gradient's, the layer it first shows in and the parameter."""
    found: dict[tuple[str, bool], FirstNonFinite] = {}
    for culprit in culprits:
        found.setdefault((culprit.phase, culprit.name.endswith((".weight", ".bias"))), culprit)
    return list(found.values())


def _watched(module: nn.Module, micro_batch: int, seen: list[FirstNonFinite]) -> list[Any]:
    """Looks at the output of every module that has no modules of its own, and at the gradient that comes back to it."""
    names = [(name, part) for name, part in module.named_modules() if name and not any(part.children())]
    return [part.register_forward_hook(_looking(name, micro_batch, seen)) for name, part in names]


def _looking(name: str, micro_batch: int, seen: list[FirstNonFinite]) -> Callable[..., None]:
    def look(module: nn.Module, inputs: Any, y: Any) -> None:
        if not isinstance(y, Tensor):
            return
        if not _finite(y):
            seen.append(_values("forward", name, y, micro_batch))
        if y.requires_grad:
            y.register_hook(lambda gradient: None if _finite(gradient) else seen.append(_values("backward", name, gradient, micro_batch)))

    return look


def _values(phase: str, name: str, values: Tensor, micro_batch: int) -> FirstNonFinite:
    wild = ~values.isfinite()
    rows = tuple(int(row) for row in wild.flatten(1).any(1).nonzero().flatten()) if values.dim() > 1 else ()
    return FirstNonFinite(phase, name, micro_batch, rows, f"{int(wild.sum())} of {values.numel()} values")


def _parameter(phase: str, name: str, values: Tensor | None, micro_batch: int) -> FirstNonFinite:
    assert values is not None
    return FirstNonFinite(phase, name, micro_batch, (), f"{int((~values.isfinite()).sum())} of {values.numel()} values")


def _with_gradient(module: PlainModule) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in unique_parameters(module) if parameter.grad is not None]


def _finite(values: Tensor | None) -> bool:
    return values is None or bool(values.isfinite().all())


def replay(folder: RunFolder, experiment: Experiment, step: int, console: Console) -> tuple[Corpus, Examined]:
    """Runs step `step` (from 1) of the run again; `console` shows from where. Returns the run's text and what was found."""
    if step < 1:
        raise Mistake(f"--step {step} is not a step → count from 1, as the rows of metrics.jsonl do")
    base, first = start_of(folder, step)
    again = f"{step - 1 - first} steps trained again" if first < step - 1 else "no step in between"
    console.header([("", f"replay {folder.title} · step {step} · from {base.name if base else 'the initial weights'}, {again}")])
    corpus = prepare.load(experiment.data, ROOT, experiment.model.vocab_size)
    module, scale = reached(folder, experiment, corpus, base, first, step, console)
    loss = gpt.TokenLoss(experiment.model.vocab_size, experiment.optimizer.label_smoothing, None)
    return corpus, find_non_finite(module, loss, batches(experiment, corpus, step), scale)


def start_of(folder: RunFolder, step: int) -> tuple[Path | None, int]:
    """(checkpoint or None, the steps it has taken): the nearest that holds the weights from before the step.

    A step that was not applied left its weights as they were, so that the checkpoint made right after it will do.
    """
    complete = {checkpoint_folder.step_of(path): path for path in checkpoint_folder.steps(folder.checkpoints)}
    skipped = anomalies.path_of(folder, step).is_file() and anomalies.load(folder, step).kind == anomalies.NON_FINITE
    if skipped and step in complete:
        return complete[step], step - 1
    before = [taken for taken in complete if taken < step]
    return (complete[max(before)], max(before)) if before else (None, 0)


def reached(
    folder: RunFolder, experiment: Experiment, corpus: Corpus, base: Path | None, first: int, step: int, console: Console
) -> tuple[PlainModule, float]:
    """A plain module with the weights from before the step, in the run's precision, and the loss scale. Trains what lies in between."""
    choose_accelerator()
    distributed.start(0, 1, 0, None)
    try:
        alone = experiment.model_copy(update={"parallel": Parallel()})
        engine = _engine(folder, alone)
        if base is not None:
            load_checkpoint(base, engine)
        elif path := resume.init_from_path(experiment, ROOT):
            load_initial(path, engine)
        with console.progress("steps in between", step - 1 - first) as advance:
            for taken in range(first, step - 1):
                lr = learning_rate(taken, experiment.optimizer, experiment.schedule.steps)
                engine.train_batch(batches(experiment, corpus, taken + 1), lr)
                advance()
        return _plain(folder, experiment, engine), float(getattr(engine.optimizer, "loss_scale", None) or 1.0)
    finally:
        distributed.stop()


def _layers(folder: RunFolder, experiment: Experiment) -> list[Any]:
    return gpt.layers(experiment.model, Grid(), experiment.seed, load_variants(folder.source, experiment.model))


def _engine(folder: RunFolder, experiment: Experiment) -> Engine:
    loss = gpt.TokenLoss(experiment.model.vocab_size, experiment.optimizer.label_smoothing, None)
    return make_engine(_layers(folder, experiment), loss, Grid(), engine_settings(experiment, layout(experiment, 1)))


def _plain(folder: RunFolder, experiment: Experiment, engine: Engine) -> PlainModule:
    module = PlainModule(_layers(folder, experiment))
    weights = dict(engine.full_weights())
    with torch.no_grad():
        for name, parameter in unique_parameters(module):
            parameter.copy_(weights[name])
    return module.to(distributed.PRECISIONS[experiment.precision])


def batches(experiment: Experiment, corpus: Corpus, step: int) -> list[MicroBatch]:
    """All micro-batches of a step (from 1), as one data rank would take them."""
    schedule, model = experiment.schedule, experiment.model
    found = train_micro_batches(
        corpus.train, model.seq_length, schedule.batch_size, schedule.micro_batch_size, 0, 1, experiment.seed, step - 1
    )
    return [MicroBatch.of(b.ids, b.targets, b.weights, b.samples if model.drops else None) for b in found]
