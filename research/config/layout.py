"""The layout of a run: rank grid, batch arithmetic and engine settings that follow from an experiment and the number of ranks.

Imports no torch.
"""

from dataclasses import dataclass

from models.encoder_config import T5, AnyModel
from parallel.engines.deepspeed_config import EngineSettings
from research.config.batch_sizes import BatchSizes
from research.config.schema import Experiment, Parallel, Schedule
from research.config.sequence_lengths import SequenceLengths


@dataclass(frozen=True)
class Layout:
    """Axes of the rank grid, ZeRO stage as run, and the batch arithmetic of one step."""

    pipe: int
    data: int
    tensor: int
    world: int
    zero_stage: int
    micro_batches: int
    """Micro-batches that a data rank accumulates before an optimizer step with schedule.batch_size sequences."""
    tokens_per_step: int
    """Of a step with schedule.batch_size sequences of full length."""
    batch_sizes: BatchSizes
    """The sequences of each step."""
    sequence_lengths: SequenceLengths
    """The tokens of each sequence."""

    def micro_batches_of(self, step: int) -> int:
        """Micro-batches that a data rank accumulates in a step, counted from 0."""
        return self.micro_batches * self.batch_sizes.of(step) // self.batch_sizes.size

    def tokens_before(self, step: int) -> int:
        """The tokens of all steps before `step`, counted from 0."""
        return self.sequence_lengths.before(self.batch_sizes.before(step))


def layout(experiment: Experiment, world: int) -> Layout:
    """The layout on `world` ranks. research.config.checks.check has refused what does not divide."""
    parallel, schedule = experiment.parallel, experiment.schedule
    data = world // (parallel.pipe * parallel.tensor)
    return Layout(
        pipe=parallel.pipe,
        data=data,
        tensor=parallel.tensor,
        world=world,
        zero_stage=effective_zero_stage(parallel),
        micro_batches=schedule.batch_size // (schedule.micro_batch_size * data),
        tokens_per_step=schedule.batch_size * sample_length(experiment.model),
        batch_sizes=batch_sizes(schedule),
        sequence_lengths=sequence_lengths(experiment),
    )


def sample_length(model: AnyModel) -> int:
    """The tokens of a sample: for a T5 those of its source and of its target."""
    return model.seq_length + (model.source_length if isinstance(model, T5) else 0)


def batch_sizes(schedule: Schedule) -> BatchSizes:
    """The sequences of each step."""
    return BatchSizes(schedule.batch_size, schedule.batch_ramp)


def sequence_lengths(experiment: Experiment) -> SequenceLengths:
    """The tokens of each sequence."""
    return SequenceLengths(sample_length(experiment.model), batch_sizes(experiment.schedule), experiment.schedule.length_ramp)


def effective_zero_stage(parallel: Parallel) -> int:
    """The stage that runs: 0 runs as 1, because DeepSpeed's stage 0 computes a wrong gradient norm or none (docs/deepspeed.md)."""
    return max(parallel.zero_stage, 1)


def engine_settings(experiment: Experiment, layout: Layout, optimizer_class: type | None = None) -> EngineSettings:
    """The settings from which the DeepSpeed JSON is derived. `optimizer_class`: what `optimizer.name` names; None for AdamW."""
    optimizer, parallel = experiment.optimizer, experiment.parallel
    return EngineSettings(
        precision=experiment.precision,
        zero_stage=layout.zero_stage,
        micro_batch_size=experiment.schedule.micro_batch_size,
        micro_batches=layout.micro_batches,
        clip=optimizer.clip,
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        optimizer_class=optimizer_class,
        offload_optimizer=parallel.offload_optimizer,
        offload_parameters=parallel.offload_parameters,
        explicit=experiment.deepspeed,
    )
