"""What must hold between settings and the size of the world before anything heavy is imported. One function, one sentence."""

import itertools
import math

from models.config import GPT
from parallel.errors import Mistake, listed
from research.cluster.environment import Ranks
from research.config.layout import (
    Layout,
    effective_zero_stage,
    layout,
)
from research.config.schema import Experiment

__all__ = ["Layout", "check", "effective_zero_stage", "layout"]

RANKS_OPTION = {"deepspeed": "--num_gpus {}", "torchrun": "--nproc_per_node {}", "srun": "--ntasks-per-node {}"}
"""How each launcher is told the number of ranks on a node."""


def check(experiment: Experiment, ranks: Ranks) -> None:
    """Raise the first Mistake there is, settings first, then the world, then the batch."""
    _tensor_divides(experiment)
    _tensor_divides_sequence(experiment)
    _every_stage_has_a_block(experiment)
    _zero_with_pipeline(experiment)
    _offload_with_pipeline(experiment)
    _offload_has_its_stage(experiment)
    _warmup_fits(experiment)
    _final_decay(experiment)
    _grid_divides_world(experiment, ranks)
    _batch_divides(experiment, ranks.world // (experiment.parallel.pipe * experiment.parallel.tensor))


def _tensor_divides(experiment: Experiment) -> None:
    model, tensor = experiment.model, experiment.parallel.tensor
    way_out = f"use {listed(tensor_degrees(model)[:8])}{_or_pipe(experiment)}"
    for name in ("num_heads", "ffn_size"):
        if getattr(model, name) % tensor:
            raise Mistake(f"parallel.tensor = {tensor} does not divide model.{name} = {getattr(model, name)} → {way_out}")
    if not kv_heads_fit(model, tensor):
        raise Mistake(f"parallel.tensor = {tensor} does not fit model.num_kv_heads = {model.num_kv_heads} → {way_out}")


def _or_pipe(experiment: Experiment) -> str:
    """The other way to cut a model over as many ranks, where its blocks come out even: 9 heads are not for 2 ranks, 30 blocks are."""
    parallel, even = experiment.parallel, experiment.model.num_layers % experiment.parallel.tensor == 0
    return f", or parallel.pipe = {parallel.tensor}" if even and parallel.pipe == 1 and parallel.zero_stage <= 1 else ""


def kv_heads_fit(model: GPT, tensor: int) -> bool:
    """Whether the kv heads can be dealt to `tensor` ranks: whole heads each, or one head shared feature-wise by several ranks."""
    if model.num_kv_heads % tensor == 0:
        return True
    return tensor % model.num_kv_heads == 0 and model.head_size % (tensor // model.num_kv_heads) == 0


def _tensor_divides_sequence(experiment: Experiment) -> None:
    length, tensor = experiment.model.seq_length, experiment.parallel.tensor
    if experiment.parallel.sequence and length % tensor:
        raise Mistake(
            f"parallel.tensor = {tensor} does not divide model.seq_length = {length} → "
            f"use {listed([n for n in tensor_degrees(experiment.model) if length % n == 0][:8])}, or parallel.sequence False"
        )


def tensor_degrees(model: GPT) -> list[int]:
    """The tensor degrees by which heads and ffn can be sliced."""
    return [n for n in _divisors(math.gcd(model.num_heads, model.ffn_size)) if kv_heads_fit(model, n)]


def _every_stage_has_a_block(experiment: Experiment) -> None:
    pipe, blocks = experiment.parallel.pipe, experiment.model.num_layers
    if pipe > blocks:
        raise Mistake(f"parallel.pipe = {pipe} leaves stages without a block of model.num_layers = {blocks} → use pipe {blocks} or fewer")


def _zero_with_pipeline(experiment: Experiment) -> None:
    parallel = experiment.parallel
    if parallel.pipe > 1 and parallel.zero_stage > 1:
        raise Mistake(
            f"parallel.zero_stage = {parallel.zero_stage} does not work with parallel.pipe = {parallel.pipe} → use zero_stage 1, or pipe 1"
        )


def _offload_with_pipeline(experiment: Experiment) -> None:
    parallel = experiment.parallel
    for name in ("offload_optimizer", "offload_parameters"):
        if parallel.pipe > 1 and getattr(parallel, name):
            raise Mistake(f"parallel.{name} = True does not work with parallel.pipe = {parallel.pipe} → use {name} False, or pipe 1")


def _offload_has_its_stage(experiment: Experiment) -> None:
    parallel = experiment.parallel
    for name, stages in (("offload_optimizer", (2, 3)), ("offload_parameters", (3,))):
        if getattr(parallel, name) and parallel.zero_stage not in stages:
            raise Mistake(
                f"parallel.{name} = True does not work with parallel.zero_stage = {parallel.zero_stage} → "
                f"use zero_stage {listed(stages)}, or {name} False"
            )


def _warmup_fits(experiment: Experiment) -> None:
    warmup, steps = experiment.optimizer.warmup_steps, experiment.schedule.steps
    if warmup > steps:
        raise Mistake(f"optimizer.warmup_steps = {warmup} is more than schedule.steps = {steps} → use {steps} or fewer warm-up steps")


def _final_decay(experiment: Experiment) -> None:
    optimizer, steps = experiment.optimizer, experiment.schedule.steps
    if optimizer.decay != "wsd":
        if optimizer.decay_steps is not None:
            raise Mistake(
                f"optimizer.decay_steps = {optimizer.decay_steps} has no effect with optimizer.decay = {optimizer.decay!r} → "
                "leave it out (None), or use decay 'wsd'"
            )
    elif optimizer.decay_steps is None:
        raise Mistake(f"optimizer.decay = 'wsd' needs optimizer.decay_steps → set it, for example to {max(1, steps // 5)} of {steps} steps")
    elif optimizer.warmup_steps + optimizer.decay_steps > steps:
        raise Mistake(
            f"optimizer.warmup_steps + optimizer.decay_steps = {optimizer.warmup_steps} + {optimizer.decay_steps} is more than "
            f"schedule.steps = {steps} → make the three fit"
        )


def _grid_divides_world(experiment: Experiment, ranks: Ranks) -> None:
    pipe, tensor, world = experiment.parallel.pipe, experiment.parallel.tensor, ranks.world
    if world % (pipe * tensor) == 0:
        return
    product = f"parallel.pipe × parallel.tensor = {pipe} × {tensor} = {pipe * tensor}"
    if world < pipe * tensor:
        raise Mistake(f"{product} needs {pipe * tensor} ranks, the world has {world} → {_launch_with(pipe * tensor, ranks)}")
    raise Mistake(f"{product} does not divide the world of {world} ranks → {_launch_with(pipe * tensor, ranks)}")


def _launch_with(unit: int, ranks: Ranks) -> str:
    """'add `--num_gpus 4` to the deepspeed command': the least larger world that `unit` divides, for the launcher at hand."""
    nodes = max(1, ranks.world // ranks.local_world)
    per_node = next(n for n in itertools.count(ranks.local_world) if n * nodes % unit == 0)
    if ranks.launcher == "python":
        return f"launch with `deepspeed --num_gpus {per_node}`"
    return f"add `{RANKS_OPTION[ranks.launcher].format(per_node)}` to the {ranks.launcher} command"


def _batch_divides(experiment: Experiment, data: int) -> None:
    batch, micro = experiment.schedule.batch_size, experiment.schedule.micro_batch_size
    if batch % (micro * data) == 0:
        return
    raise Mistake(
        f"schedule.batch_size = {batch} is not a multiple of schedule.micro_batch_size × data ranks = {micro} × {data} = {micro * data} → "
        f"use {_batches_that_work(batch, micro, data)}"
    )


def _batches_that_work(batch: int, micro: int, data: int) -> str:
    """The nearest batch sizes below and above, or the micro-batch sizes that this batch allows."""
    unit = micro * data
    sizes = [size for size in (batch - batch % unit, batch + -batch % unit) if size]
    sentence = f"batch_size {listed(sizes)}"
    if batch % data == 0:
        fitting = [size for size in _divisors(batch // data) if size < micro] or [1]
        sentence += f", or micro_batch_size {listed(fitting[-4:])}"
    return sentence


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
