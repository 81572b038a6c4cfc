"""Checks of an experiment against the number of ranks, before torch is imported: what cannot run together is refused.

Every refusal is a Mistake: one sentence with both numbers and what would work.
"""

import math

from models.config import VARIANT
from models.encoder_config import BERT, T5, AnyModel
from parallel.errors import Mistake, listed
from research.cluster.environment import RANKS_OPTION, Ranks
from research.config.examples import MODELS_OF_EXAMPLES, STREAM, Masked, describe_examples, kinds_for
from research.config.layout import batch_sizes, sequence_lengths
from research.config.schema import MODELS, Experiment

MOST_TRIED = 65_536
"""The most micro-batch sizes that are tried for a suggestion."""


def check(experiment: Experiment, ranks: Ranks) -> None:
    """Raise the first Mistake found: the settings among themselves first, then the number of ranks, then the batch size."""
    check_settings(experiment)
    _check_world_and_batch(experiment, ranks)


def check_settings(experiment: Experiment) -> None:
    """Raise the first Mistake found in the settings among themselves, whatever the number of ranks."""
    _check_kind(experiment)
    _check_tensor_slicing(experiment)
    _check_pipeline_and_zero(experiment)
    _check_schedule(experiment)


def kv_heads_fit(model: AnyModel, tensor: int) -> bool:
    """Whether the kv heads can be sliced over `tensor` ranks: whole heads each, or one head cut by features over several ranks."""
    if model.num_kv_heads % tensor == 0:
        return True
    return tensor % model.num_kv_heads == 0 and model.head_size % (tensor // model.num_kv_heads) == 0


def tensor_degrees(model: AnyModel) -> list[int]:
    """The tensor-parallel degrees over which heads and MLP can be sliced."""
    largest = math.gcd(model.num_heads, model.ffn_size)
    small = [tensor for tensor in range(1, math.isqrt(largest) + 1) if largest % tensor == 0]  # the other divisors are largest / small
    return [tensor for tensor in sorted({*small, *(largest // tensor for tensor in small)}) if kv_heads_fit(model, tensor)]


def _check_kind(experiment: Experiment) -> None:
    """Samples must be of the kind that the model takes, and only a GPT writes and scores texts while it trains."""
    examples, own = experiment.data.examples, type(experiment.model).__name__
    kinds = kinds_for(examples)
    if kinds and experiment.model.kind not in kinds:
        shown = repr(examples) if isinstance(examples, str) else f"{type(examples).__name__}(…)"
        names = listed(f"a {MODELS[kind].__name__}" for kind in kinds)
        fitting = listed(kind for kind, models in MODELS_OF_EXAMPLES.items() if experiment.model.kind in models)
        raise Mistake(f"data.examples = {shown} are samples for {names}, and the model is a {own} → use {fitting} (docs/samples.md)")
    has_head = isinstance(experiment.model, BERT) and experiment.model.sentence_head
    if isinstance(examples, Masked) and examples.sentence_order != has_head:
        raise Mistake(
            f"model.sentence_head = {has_head} does not fit data.examples = Masked(…, sentence_order={examples.sentence_order}) → set both "
            "to True, or both to False"
        )
    if experiment.model.kind != "gpt" and experiment.sample.every:
        raise Mistake(f"sample.every = {experiment.sample.every} lets the model write texts, which a {own} cannot do → use sample.every 0")
    if experiment.model.kind != "gpt" and experiment.evaluate.every:
        raise Mistake(
            f"evaluate.every = {experiment.evaluate.every} evaluates a model that continues texts, which a {own} does not → use "
            "evaluate.every 0"
        )


def _check_tensor_slicing(experiment: Experiment) -> None:
    model, parallel = experiment.model, experiment.parallel
    tensor = parallel.tensor

    # 9 heads cannot be sliced over 2 ranks where 30 layers can: then pipeline stages are the other way out
    way_out = f"use {listed(tensor_degrees(model)[:8])}"
    if model.num_layers % tensor == 0 and parallel.pipe == 1 and parallel.zero_stage <= 1:
        way_out += f", or parallel.pipe = {tensor}"

    for name in ("num_heads", "ffn_size"):
        if getattr(model, name) % tensor:
            raise Mistake(f"parallel.tensor = {tensor} does not divide model.{name} = {getattr(model, name)} → {way_out}")
    if not kv_heads_fit(model, tensor):
        raise Mistake(f"parallel.tensor = {tensor} does not fit model.num_kv_heads = {model.num_kv_heads} → {way_out}")
    for name in ("seq_length", "source_length") if parallel.sequence else ():
        length = getattr(model, name, 0)  # only a T5 has a source
        if length % tensor:
            degrees = [degree for degree in tensor_degrees(model) if length % degree == 0]
            raise Mistake(
                f"parallel.tensor = {tensor} does not divide model.{name} = {length} → use {listed(degrees[:8])}, or "
                "parallel.sequence False"
            )


def _check_pipeline_and_zero(experiment: Experiment) -> None:
    parallel, model = experiment.parallel, experiment.model
    pipe, stage = parallel.pipe, parallel.zero_stage
    blocks, named = model.num_layers, f"model.num_layers = {model.num_layers}"
    if isinstance(model, T5):
        blocks, named = model.num_encoder_layers + blocks, f"model.num_encoder_layers = {model.num_encoder_layers} and {named}"
    if pipe > blocks:
        raise Mistake(f"parallel.pipe = {pipe} leaves stages without a block of {named} → use pipe {blocks} or fewer")
    if pipe > 1 and stage > 1:
        raise Mistake(f"parallel.zero_stage = {stage} does not work with parallel.pipe = {pipe} → use zero_stage 1, or pipe 1")

    needed_stages = {"offload_optimizer": (2, 3), "offload_parameters": (3,)}
    offloads = [name for name in needed_stages if getattr(parallel, name)]
    for name in offloads if pipe > 1 else ():
        raise Mistake(f"parallel.{name} = True does not work with parallel.pipe = {pipe} → use {name} False, or pipe 1")
    for name in offloads:
        if stage not in needed_stages[name]:
            raise Mistake(
                f"parallel.{name} = True does not work with parallel.zero_stage = {stage} → "
                f"use zero_stage {listed(needed_stages[name])}, or {name} False"
            )


def _check_schedule(experiment: Experiment) -> None:
    optimizer, steps = experiment.optimizer, experiment.schedule.steps
    lengths = sequence_lengths(experiment).lengths  # raises a Mistake if a ramp does not lead to batch_size or seq_length
    if experiment.schedule.length_ramp and experiment.data.examples != STREAM:
        raise Mistake(
            f"schedule.length_ramp shortens windows of the stream, and data.examples = {describe_examples(experiment.data.examples)!r} "
            f"has no such windows → use data.examples = {STREAM!r}, or no length_ramp"
        )
    tensor = experiment.parallel.tensor
    uneven = next((length for length in lengths if length % tensor), None)
    if experiment.parallel.sequence and uneven is not None:
        raise Mistake(
            f"schedule.length_ramp has sequences of {uneven} tokens, which parallel.tensor = {tensor} does not divide → "
            f"use a start and an increment that are multiples of {tensor}, or parallel.sequence False"
        )
    recorded = experiment.profile.recorded
    if recorded and recorded[-1] > steps:
        way_out = f"use {recorded[0]}-{steps}" if recorded[0] <= steps else f"use steps up to {steps}"
        raise Mistake(f"profile.steps = {experiment.profile.steps!r} goes beyond the last step, schedule.steps = {steps} → {way_out}")
    warmup, decay = optimizer.warmup_steps, optimizer.decay_steps
    if warmup > steps:
        raise Mistake(f"optimizer.warmup_steps = {warmup} is more than schedule.steps = {steps} → use {steps} or fewer warm-up steps")
    if optimizer.decay.startswith(VARIANT):
        return  # it decides for itself what decay_steps means
    if optimizer.decay != "wsd":
        if decay is not None:
            raise Mistake(
                f"optimizer.decay_steps = {decay} has no effect with optimizer.decay = {optimizer.decay!r} → "
                "leave it out (None), or use decay 'wsd'"
            )
    elif decay is None:
        raise Mistake(f"optimizer.decay = 'wsd' needs optimizer.decay_steps → set it, for example to {max(1, steps // 5)} of {steps} steps")
    elif warmup + decay > steps:
        raise Mistake(
            f"optimizer.warmup_steps + optimizer.decay_steps = {warmup} + {decay} is more than "
            f"schedule.steps = {steps} → make the three fit"
        )


def _check_world_and_batch(experiment: Experiment, ranks: Ranks) -> None:
    pipe, tensor, world = experiment.parallel.pipe, experiment.parallel.tensor, ranks.world
    unit = pipe * tensor
    if world % unit:
        needs = f"needs {unit} ranks, the world has {world}" if world < unit else f"does not divide the world of {world} ranks"
        raise Mistake(f"parallel.pipe × parallel.tensor = {pipe} × {tensor} = {unit} {needs} → {_launch_with(unit, ranks)}")

    # the batch is split evenly: over the data ranks, and on each of them into micro-batches
    data, batch, micro = world // unit, experiment.schedule.batch_size, experiment.schedule.micro_batch_size
    unit = micro * data
    uneven = next((size for size in batch_sizes(experiment.schedule).sizes if size % unit), None)
    if uneven not in (None, batch):
        raise Mistake(
            f"schedule.batch_ramp has steps of {uneven} sequences, which is not a multiple of schedule.micro_batch_size × data ranks = "
            f"{micro} × {data} = {unit} → use a start and an increment that are"
        )
    if uneven:
        way_out = f"batch_size {listed(size for size in (batch - batch % unit, batch + -batch % unit) if size)}"
        if batch % data == 0:
            fitting = [size for size in range(1, min(micro, batch // data + 1, MOST_TRIED)) if batch // data % size == 0] or [1]
            way_out += f", or micro_batch_size {listed(fitting[-4:])}"
        raise Mistake(
            f"schedule.batch_size = {batch} is not a multiple of schedule.micro_batch_size × data ranks = {micro} × {data} = {unit} → "
            f"use {way_out}"
        )


def _launch_with(unit: int, ranks: Ranks) -> str:
    """'add `--num_gpus 4` to the deepspeed command': the least number of ranks not below today's that `unit` divides."""
    nodes = max(1, ranks.world // ranks.local_world)
    least = unit // math.gcd(unit, nodes)
    per_node = -(-ranks.local_world // least) * least
    if ranks.launcher == "python":
        return f"launch with `deepspeed --num_gpus {per_node}`"
    return f"add `{RANKS_OPTION[ranks.launcher].format(per_node)}` to the {ranks.launcher} command"
