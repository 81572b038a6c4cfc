"""Trains a few steps of the shrunk experiment for `verify`: on one layout's real engine, or serially in plain torch as the reference.

Both read the same batches and return the same record: every step's layer outputs, loss and gradients, and the final weights, by logical
name.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from models import architectures
from models.bert import PretrainingLoss
from models.gpt import TokenLoss
from parallel.engines.deepspeed_config import EngineSettings
from parallel.engines.engine import Engine, Loss, make_engine
from parallel.grid import Grid, make_grid
from parallel.layers import Call, PlainModule, unique_parameters
from parallel.slices import slice_of
from research.config import Experiment, serialization
from research.config.experiment_folder import load_variants
from research.config.layout import engine_settings, layout
from research.config.schema import LOSSES
from research.training.components import optimizer_class, training_loss
from research.training.sampler import context_of
from research.training.schedule import learning_rate
from research.verification.hangs import advance_at_layers, ended_if_hung
from research.verification.layouts import BUCKET_ELEMENTS, LOGITS_AT_ONCE, LayoutCase
from research.verification.random_batches import batch_of, share_of

HANG_SECONDS = 30.0
"""Seconds without progress after which a layout is taken to hang. A whole layout takes about one."""


@dataclass
class TrainingRecord:
    """The results of a training run: losses and gradient norms by step, outputs by layer@step, gradients by name@step, final weights."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """What each layer returned for this rank's samples, 'b s d', or this rank's positions or vocabulary rows of it."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def add_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Adds the gradients of the current step, whose number is `len(self.losses)`."""
        self.gradients |= {f"{name}@{len(self.losses)}": gradient for name, gradient in gradients.items()}

    def keep_output(self, layer: str, call: Call) -> Call:
        """A CallHook that keeps what the layer returns; what it returns behind x, under layer.1@step. The outputs of a step's micro-batches
        are joined in their order."""

        def kept(*arguments: Any, **context: Any) -> Any:
            result = call(*arguments, **context)
            key = f"{layer}@{len(self.losses)}"
            outputs = result if isinstance(result, tuple) else (result,)
            for name, output in zip([key, *(f"{layer}.{i}@{len(self.losses)}" for i in range(1, len(outputs)))], outputs, strict=True):
                earlier = [self.outputs[name]] if name in self.outputs else []
                self.outputs[name] = torch.cat([*earlier, output.detach()])
            return result

        return kept

    def save(self, folder: Path, rank: int) -> None:
        """Writes rank_i.json and rank_i.safetensors."""
        groups = {"outputs": self.outputs, "gradients": self.gradients, "weights": self.weights}
        tensors = {f"{group}/{name}": tensor.contiguous() for group, found in groups.items() for name, tensor in found.items()}
        save_file(tensors, folder / f"rank_{rank}.safetensors")
        (folder / f"rank_{rank}.json").write_text(json.dumps({"losses": self.losses, "norms": self.norms}))

    @staticmethod
    def load(folder: Path, rank: int) -> "TrainingRecord":
        """Reads what `save` wrote."""
        scalars = json.loads((folder / f"rank_{rank}.json").read_text())
        tensors: dict[str, dict[str, Tensor]] = {"outputs": {}, "gradients": {}, "weights": {}}
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


def on_rank(folder: Path, hang_seconds: float = HANG_SECONDS) -> None:
    """Trains `folder`'s job on this rank's engine and saves the record in the folder. Collective."""
    experiment, case, steps, source = read_job(folder)
    grid = make_grid(case.pipe, case.tensor, case.sequence)
    record = TrainingRecord()
    with ended_if_hung(folder, grid.rank, hang_seconds) as progress:
        progress.advance("building the engine")
        variants = load_variants(source, experiment)  # once: the classes of a variant.py may share its module's state
        engine = engine_of(experiment, case, grid, variants, loss_of(experiment, grid, variants))
        engine.watch_gradients(record.add_gradients)
        engine.module.watch(record.keep_output)
        engine.module.watch(advance_at_layers(progress))
        for step in range(steps):
            progress.stepping(step + 1)
            lr = learning_rate(step, experiment.optimizer, experiment.schedule.steps, variants)
            record.losses.append(engine.train_batch(share_of(experiment, step, grid, case), lr))
            record.norms.append(engine.gradient_norm())
        progress.advance("gathering the weights")
        record.weights = dict(engine.full_weights())
    record.save(folder, grid.rank)


def binding_clip(experiment: Experiment, steps: int, variants: Path) -> Experiment:
    """The experiment with a clip that binds in some steps and not in others, or in all if their gradients are of about one length."""
    free = experiment.model_copy(update={"optimizer": experiment.optimizer.model_copy(update={"clip": 0.0})})
    norms = reference_run(free, steps, variants).norms
    least, most = min(norms), max(norms)
    clip = math.sqrt(least * most) if most > 1.2 * least else least / 2
    return experiment.model_copy(update={"optimizer": experiment.optimizer.model_copy(update={"clip": clip})})


def reference_run(experiment: Experiment, steps: int, variants: Path) -> TrainingRecord:
    """Trains the reference: one process without DeepSpeed, the whole batch at once, torch's cross entropy, clipping and AdamW.

    A loss or an optimizer of variant.py stands for its own reference, on whole logits and whole parameters.
    """
    model, optimizer, own = experiment.model, experiment.optimizer, load_variants(variants, experiment)
    module = PlainModule(architectures.layers(model, Grid(), experiment.seed, own, context=context_of(experiment, own)))
    loss_function = reference_loss(experiment, own)
    parameters = dict(unique_parameters(module))

    # Weight decay applies to matrices only, by the shape of the whole parameter.
    matrices = [p for p in parameters.values() if len(slice_of(p).shape) >= 2]
    vectors = [p for p in parameters.values() if len(slice_of(p).shape) < 2]
    groups = [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    make = optimizer_class(experiment, own) or torch.optim.AdamW
    torch_optimizer = make(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay)

    record = TrainingRecord()
    module.watch(record.keep_output)
    for step in range(steps):
        # The warm-up is written out again here, so that a schedule that leaves it out is noticed.
        warming = step < optimizer.warmup_steps
        later = learning_rate(step, optimizer, experiment.schedule.steps, own)
        lr = optimizer.lr * (step + 1) / optimizer.warmup_steps if warming else later
        for group in torch_optimizer.param_groups:
            group["lr"] = lr

        batch = batch_of(experiment, step)
        loss = loss_function(module(batch.inputs(module.context)), batch.labels)
        loss.backward()
        record.add_gradients({name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()})
        record.losses.append(float(loss.detach()))
        record.norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), optimizer.clip or torch.inf)))
        torch_optimizer.step()
        torch_optimizer.zero_grad()
    record.weights = {name: parameter.detach() for name, parameter in parameters.items()}
    return record


def reference_loss(experiment: Experiment, variants: Mapping[str, Any]) -> Loss:
    """torch's own cross entropy over whole logits, and over those of a sentence head. Only a loss of variant.py is taken as it is."""
    if experiment.loss not in LOSSES:
        return training_loss(experiment, None, variants)

    def cross_entropy(output: Tensor | tuple[Tensor, Tensor], labels: tuple[Tensor, ...]) -> Tensor:
        (targets, weights, *of_sentences), smoothing = labels, experiment.optimizer.label_smoothing
        logits, of_sentence = output if isinstance(output, tuple) else (output, None)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing)
        loss = (weights.flatten() * losses).sum()
        if of_sentence is not None:
            sentences, sentence_weights = of_sentences
            loss = loss + (sentence_weights * F.cross_entropy(of_sentence, sentences, reduction="none")).sum()
        return loss

    return cross_entropy


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes with one thread: more make small matrices slower, on a busy machine many times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def loss_of(experiment: Experiment, grid: Grid, variants: Mapping[str, Any]) -> Loss:
    """The experiment's loss function, ours with several blocks of rows in a micro-batch. `variants`: what it names of its variant.py."""
    loss = training_loss(experiment, grid.tensor_group, variants)
    return replace(loss, logits_at_once=LOGITS_AT_ONCE) if isinstance(loss, TokenLoss | PretrainingLoss) else loss


def engine_of(experiment: Experiment, case: LayoutCase, grid: Grid, variants: Mapping[str, Any], loss: Loss) -> Engine:
    """The engine that trains the experiment's model on this layout."""
    layers = architectures.layers(experiment.model, grid, experiment.seed, variants, case.recompute, context_of(experiment, variants))
    return make_engine(layers, loss, grid, replace(settings_of(experiment, case), optimizer_class=optimizer_class(experiment, variants)))


def settings_of(experiment: Experiment, case: LayoutCase) -> EngineSettings:
    """The settings of the engine that trains the experiment on this layout, with small buckets."""
    parallel = experiment.parallel
    changes = {
        "pipe": case.pipe,
        "tensor": case.tensor,
        "zero_stage": case.zero_stage,
        "sequence": case.sequence,
        "recompute": case.recompute,
        # An experiment's offload takes part on the layouts that can have it.
        "offload_optimizer": parallel.offload_optimizer and case.zero_stage >= 2,
        "offload_parameters": parallel.offload_parameters and case.zero_stage == 3,
    }
    schedule = experiment.schedule.model_copy(update={"micro_batch_size": case.micro_batch})
    laid_out = experiment.model_copy(update={"parallel": parallel.model_copy(update=changes), "schedule": schedule})
    return replace(engine_settings(laid_out, layout(laid_out, case.world)), bucket_elements=BUCKET_ELEMENTS)
