"""What `verify` trains: a few steps of the shrunk experiment, on one layout's real engine or serially in plain torch.

Both read the same batches and leave the same record: every step's loss, every step's gradients, the final weights, by logical name.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import gpt
from parallel.engines.engine import Engine, Loss, MicroBatch, make_engine
from parallel.grid import Grid, make_grid
from parallel.layers import PlainModule, unique_parameters
from parallel.slices import slice_of
from research.config import Experiment, serialization
from research.config.experiment_folder import load_variants
from research.config.layout import engine_settings, layout
from research.verification.layouts import BATCH, LayoutCase


@dataclass
class TrainingRecord:
    """What a training run was: losses and gradient norms by step; gradients (name@step) and final weights by logical name."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def add_gradients(self, found: dict[str, Tensor]) -> None:
        """Those of the step under way, `len(self.losses)`."""
        self.gradients |= {f"{name}@{len(self.losses)}": gradient for name, gradient in found.items()}

    def save(self, folder: Path, rank: int) -> None:
        """rank_i.json and rank_i.safetensors."""
        tensors = {f"gradients/{k}": v for k, v in self.gradients.items()} | {f"weights/{k}": v for k, v in self.weights.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"rank_{rank}.safetensors")
        (folder / f"rank_{rank}.json").write_text(json.dumps({"losses": self.losses, "norms": self.norms}))

    @staticmethod
    def load(folder: Path, rank: int) -> "TrainingRecord":
        """What `save` wrote."""
        facts, tensors = json.loads((folder / f"rank_{rank}.json").read_text()), load_file(folder / f"rank_{rank}.safetensors")
        parts: dict[str, dict[str, Tensor]] = {"gradients": {}, "weights": {}}
        for name, tensor in tensors.items():
            kind, _, key = name.partition("/")
            parts[kind][key] = tensor
        return TrainingRecord(facts["losses"], facts["norms"], **parts)


def write_job(folder: Path, experiment: Experiment, cut: LayoutCase, steps: int, variants: Path) -> None:
    """What `on_rank` reads."""
    job = {"experiment": serialization.resolved(experiment), "cut": vars(cut), "steps": steps, "variants": str(variants)}
    (folder / "job.json").write_text(json.dumps(job))


def read_job(folder: Path) -> tuple[Experiment, LayoutCase, int, Path]:
    """What `write_job` wrote."""
    job = json.loads((folder / "job.json").read_text())
    settings = {key: value for key, value in job["experiment"].items() if key != "schema"}
    return serialization.build(settings), LayoutCase(**job["cut"]), job["steps"], Path(job["variants"])


def on_rank(folder: Path) -> None:
    """Trains `folder`'s job on this rank's engine and saves the record beside it. Collective."""
    experiment, cut, steps, variants = read_job(folder)
    grid = make_grid(cut.pipe, cut.tensor, cut.sequence)
    record = TrainingRecord()
    engine = engine_of(experiment, cut, grid, variants, loss_of(experiment, grid))
    engine.watch_gradients(record.add_gradients)
    for step in range(steps):
        record.losses.append(engine.train_batch(share_of(experiment, step, grid, cut), experiment.optimizer.lr))
        record.norms.append(engine.gradient_norm())
    record.weights = dict(engine.full_weights())
    record.save(folder, grid.rank)


def loss_of(experiment: Experiment, grid: Grid) -> Loss:
    """The experiment's own."""
    return gpt.TokenLoss(experiment.model.vocab_size, experiment.optimizer.label_smoothing, grid.tensor_group)


def engine_of(experiment: Experiment, cut: LayoutCase, grid: Grid, variants: Path, loss: Loss) -> Engine:
    """The experiment's model on the cut's engine."""
    parallel = experiment.parallel.model_copy(
        update={"pipe": cut.pipe, "tensor": cut.tensor, "zero_stage": cut.zero_stage, "sequence": cut.sequence, "recompute": cut.recompute}
    )
    micro = cut.micro_batch
    whole = experiment.model_copy(
        update={"parallel": parallel, "schedule": experiment.schedule.model_copy(update={"micro_batch_size": micro})}
    )
    model = experiment.model
    layers = gpt.layers(model, grid, experiment.seed, load_variants(variants, model), cut.recompute)
    return make_engine(layers, loss, grid, engine_settings(whole, layout(whole, cut.world)))


def batch_of(experiment: Experiment, step: int) -> MicroBatch:
    """A step's global batch: random tokens, every third one masked in the second half, so that a mean of means is another number."""
    model = experiment.model
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, model.vocab_size, (BATCH, model.seq_length + 1), generator=g)
    mask = torch.ones(BATCH, model.seq_length)
    mask[BATCH // 2 :, ::3] = 0
    samples = step * BATCH + torch.arange(BATCH)
    return MicroBatch(tokens[:, :-1], tokens[:, 1:], mask / mask.sum(), (samples,) if model.drops else ())


def share_of(experiment: Experiment, step: int, grid: Grid, cut: LayoutCase) -> Iterator[MicroBatch]:
    """This data rank's micro-batches of a step, weighted for engines that average over micro-batches and data ranks."""
    whole, micro = batch_of(experiment, step), cut.micro_batch
    for i in range(cut.accumulated):
        first = (grid.data_rank * cut.accumulated + i) * micro
        rows = slice(first, first + micro)
        weights = whole.weights[rows] * cut.accumulated * cut.data
        yield MicroBatch(whole.ids[rows], whole.targets[rows], weights, tuple(tensor[rows] for tensor in whole.context))


def reference_run(experiment: Experiment, steps: int, variants: Path) -> TrainingRecord:
    """The reference: one process, no DeepSpeed, the whole batch at once, torch's AdamW."""
    model, optimizer = experiment.model, experiment.optimizer
    module = PlainModule(gpt.layers(model, Grid(), experiment.seed, load_variants(variants, model)))
    loss = loss_of(experiment, Grid())
    parameters = dict(unique_parameters(module))
    adam = _adam(parameters, experiment)
    record = TrainingRecord()
    for step in range(steps):
        batch = batch_of(experiment, step)
        found = loss(module(batch.inputs()), (batch.targets, batch.weights))
        found.backward()
        record.losses.append(float(found.detach()))
        record.gradients |= {f"{name}@{step}": _gradient(p).clone() for name, p in parameters.items()}
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), optimizer.clip or torch.inf)
        record.norms.append(float(norm))
        adam.step()
        adam.zero_grad()
    record.weights = {name: parameter.detach() for name, parameter in parameters.items()}
    return record


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _adam(parameters: dict[str, torch.nn.Parameter], experiment: Experiment) -> torch.optim.Optimizer:
    optimizer = experiment.optimizer
    matrices = [p for p in parameters.values() if len(slice_of(p).shape) >= 2]
    vectors = [p for p in parameters.values() if len(slice_of(p).shape) < 2]
    groups = [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps)
