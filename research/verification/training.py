"""Trains a few steps of the shrunk experiment for `verify`: on one layout's real engine, or serially in plain torch as the reference.

Both read the same batches and return the same record: every step's loss and gradients, and the final weights, by logical name.
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
from research.training.components import optimizer_class, training_loss
from research.verification.layouts import BATCH, LayoutCase


@dataclass
class TrainingRecord:
    """The results of a training run: losses and gradient norms by step, gradients by name@step, final weights by logical name."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def add_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Adds the gradients of the current step, whose number is `len(self.losses)`."""
        self.gradients |= {f"{name}@{len(self.losses)}": gradient for name, gradient in gradients.items()}

    def save(self, folder: Path, rank: int) -> None:
        """Writes rank_i.json and rank_i.safetensors."""
        tensors = {f"gradients/{k}": v for k, v in self.gradients.items()} | {f"weights/{k}": v for k, v in self.weights.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"rank_{rank}.safetensors")
        (folder / f"rank_{rank}.json").write_text(json.dumps({"losses": self.losses, "norms": self.norms}))

    @staticmethod
    def load(folder: Path, rank: int) -> "TrainingRecord":
        """Reads what `save` wrote."""
        scalars = json.loads((folder / f"rank_{rank}.json").read_text())
        tensors: dict[str, dict[str, Tensor]] = {"gradients": {}, "weights": {}}
        for key, tensor in load_file(folder / f"rank_{rank}.safetensors").items():
            group, _, name = key.partition("/")
            tensors[group][name] = tensor
        return TrainingRecord(scalars["losses"], scalars["norms"], **tensors)


def write_job(folder: Path, experiment: Experiment, case: LayoutCase, steps: int, variants: Path) -> None:
    """Writes job.json, which the ranks read. `variants` is the folder of the experiment's variant.py."""
    job = {"experiment": serialization.resolved(experiment), "case": vars(case), "steps": steps, "variants": str(variants)}
    (folder / "job.json").write_text(json.dumps(job))


def read_job(folder: Path) -> tuple[Experiment, LayoutCase, int, Path]:
    """Reads what `write_job` wrote."""
    job = json.loads((folder / "job.json").read_text())
    settings = {key: value for key, value in job["experiment"].items() if key != "schema"}
    return serialization.build(settings), LayoutCase(**job["case"]), job["steps"], Path(job["variants"])


def on_rank(folder: Path) -> None:
    """Trains `folder`'s job on this rank's engine and saves the record in the folder. Collective."""
    experiment, case, steps, variants = read_job(folder)
    grid = make_grid(case.pipe, case.tensor, case.sequence)
    record = TrainingRecord()
    engine = engine_of(experiment, case, grid, variants, loss_of(experiment, grid, variants))
    engine.watch_gradients(record.add_gradients)
    for step in range(steps):
        record.losses.append(engine.train_batch(share_of(experiment, step, grid, case), experiment.optimizer.lr))
        record.norms.append(engine.gradient_norm())
    record.weights = dict(engine.full_weights())
    record.save(folder, grid.rank)


def reference_run(experiment: Experiment, steps: int, variants: Path) -> TrainingRecord:
    """Trains the reference: one process without DeepSpeed, the whole batch at once, the same optimizer class over whole parameters."""
    model, optimizer = experiment.model, experiment.optimizer
    module = PlainModule(gpt.layers(model, Grid(), experiment.seed, load_variants(variants, model)))
    loss_function = loss_of(experiment, Grid(), variants)
    parameters = dict(unique_parameters(module))

    # Weight decay applies to matrices only, by the shape of the whole parameter.
    matrices = [p for p in parameters.values() if len(slice_of(p).shape) >= 2]
    vectors = [p for p in parameters.values() if len(slice_of(p).shape) < 2]
    groups = [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    make = optimizer_class(experiment, load_variants(variants, experiment)) or torch.optim.AdamW
    torch_optimizer = make(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay)

    record = TrainingRecord()
    for step in range(steps):
        batch = batch_of(experiment, step)
        loss = loss_function(module(batch.inputs()), (batch.targets, batch.weights))
        loss.backward()
        record.add_gradients({name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()})
        record.losses.append(float(loss.detach()))
        record.norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), optimizer.clip or torch.inf)))
        torch_optimizer.step()
        torch_optimizer.zero_grad()
    record.weights = {name: parameter.detach() for name, parameter in parameters.items()}
    return record


def loss_of(experiment: Experiment, grid: Grid, variants: Path) -> Loss:
    """The experiment's loss function. `variants` is the folder of its variant.py."""
    return training_loss(experiment, grid.tensor_group, load_variants(variants, experiment))


def engine_of(experiment: Experiment, case: LayoutCase, grid: Grid, variants: Path, loss: Loss) -> Engine:
    """The engine that trains the experiment's model on this layout."""
    model = experiment.model
    changes = {
        "pipe": case.pipe,
        "tensor": case.tensor,
        "zero_stage": case.zero_stage,
        "sequence": case.sequence,
        "recompute": case.recompute,
    }
    parallel = experiment.parallel.model_copy(update=changes)
    schedule = experiment.schedule.model_copy(update={"micro_batch_size": case.micro_batch})
    laid_out = experiment.model_copy(update={"parallel": parallel, "schedule": schedule})
    layers = gpt.layers(model, grid, experiment.seed, load_variants(variants, model), case.recompute)
    optimizer = optimizer_class(experiment, load_variants(variants, experiment))
    return make_engine(layers, loss, grid, engine_settings(laid_out, layout(laid_out, case.world)), loss, optimizer)


def batch_of(experiment: Experiment, step: int) -> MicroBatch:
    """The global batch of a step: random tokens. In its second half every third token is masked.

    So the mean over all tokens differs from the mean of the micro-batches' means.
    """
    model = experiment.model
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, model.vocab_size, (BATCH, model.seq_length + 1), generator=generator)
    mask = torch.ones(BATCH, model.seq_length)
    mask[BATCH // 2 :, ::3] = 0
    samples = step * BATCH + torch.arange(BATCH)
    return MicroBatch(tokens[:, :-1], tokens[:, 1:], mask / mask.sum(), (samples,) if model.drops else ())


def share_of(experiment: Experiment, step: int, grid: Grid, case: LayoutCase) -> Iterator[MicroBatch]:
    """This data rank's micro-batches of a step, with weights for engines that average over micro-batches and data ranks."""
    whole, micro = batch_of(experiment, step), case.micro_batch
    for i in range(case.accumulated):
        first = (grid.data_rank * case.accumulated + i) * micro
        rows = slice(first, first + micro)
        weights = whole.weights[rows] * case.accumulated * case.data
        yield MicroBatch(whole.ids[rows], whole.targets[rows], weights, tuple(tensor[rows] for tensor in whole.context))
