"""Settings that are right alone and wrong together: contradictions, which a new run refuses, and doubts, of which it warns.

Each finding is one sentence with both numbers and the way out. Imports no torch and reads no text.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

from models.config import GPT
from parallel.errors import listed
from parallel.files import user_path
from research.cluster.environment import Ranks
from research.config.layout import batch_sizes, sequence_lengths
from research.config.schema import DECAYS, Checkpoints, Data, Experiment, Optimizer
from research.config.sources import Source, describe_texts, own_held_out_texts, texts_to_train_on

BUILTIN = "builtin:"
NO_FILE = (BUILTIN, "store:", "split:")
"""How the name of a text begins that is not the path of a file. Stores are compared by what is in them, once they are opened."""
LONGEST_NAME = 128
"""The most characters of a project, a group and a run id that W&B's server takes."""
WANDB_REFUSES = {"project": "/\\#?%:", "run id": "/\\#?%:;,'"}
"""Characters that wandb.Settings and W&B's server refuse."""
LEAST_USED = 0.5
"""The part of model.vocab_size below which the tokenizer's size gives a warning. Published models are padded by 2 % at most."""
MOST_RECORDED = 50
"""The most steps that `profile.steps` records without a warning."""
FORWARD = 3
"""How many times longer a token takes in training (forward and backward pass) than in validation."""


def contradictions(experiment: Experiment, root: Path) -> Iterator[str]:
    """What cannot be meant. Relative paths start at `root`."""
    model, optimizer, data, watch = experiment.model, experiment.optimizer, experiment.data, experiment.watch
    if optimizer.decay in DECAYS[1:] and optimizer.min_lr > optimizer.lr:
        yield (
            f"optimizer.min_lr = {optimizer.min_lr:g} is above optimizer.lr = {optimizer.lr:g}, so that {optimizer.decay} would raise "
            f"the learning rate → use min_lr {optimizer.lr / 10:g} (a tenth of lr), or decay 'constant'"
        )
    fraction = model.rotary_fraction if isinstance(model, GPT) and model.position == "rotary" else None
    if fraction is not None and int(model.head_size * fraction) < 2:
        instead = f"use {math.ceil(200 / model.head_size) / 100:g} or more" if model.head_size > 1 else "use fewer heads"
        yield (
            f"model.rotary_fraction = {fraction:g} of heads of {model.head_size} features is less than the two that are "
            f"rotated together, so that no position is encoded → {instead}, or position 'none'"
        )
    held_out_texts = [("data.validation", data.validation), *own_held_out_texts(data.train)]
    for train, (setting, held_out) in itertools.product(texts_to_train_on(data.train), held_out_texts):
        files = [user_path(root, text) for text in (train, held_out) if not text.startswith(NO_FILE)]
        if train == held_out or (len(files) == 2 and files[0].samefile(files[1])):
            which = "the text" if train == data.train else "a text"
            yield f"{setting} = {held_out!r} is {which} of data.train → name a text that is not trained on"
        elif len(files) == 2 and (_is_inside(*files) or _is_inside(*reversed(files))):
            yield (
                f"{setting} = {held_out!r} and data.train = {train!r} lie one in the other, so that the same text would be trained on and "
                "held out → move it out of the folder"
            )
    if watch.on_spike == "stop" and not watch.spike:
        yield "watch.on_spike = 'stop' has no effect with watch.spike = 0, which detects no spike → set watch.spike, for example to 6"
    if experiment.profile.memory and experiment.profile.steps is None:
        yield "profile.memory = True has no effect with profile.steps = None, which records no step → set profile.steps, such as 10-12"
    if experiment.checkpoints.keep_every and not experiment.checkpoints.every:
        keep = experiment.checkpoints.keep_every
        yield f"checkpoints.keep_every = {keep} has no effect with checkpoints.every = 0 → set checkpoints.every, for example to {keep}"


def _is_inside(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def doubts(experiment: Experiment) -> Iterator[str]:
    """What works, but is probably not meant."""
    data, evaluate, sample = experiment.data, experiment.evaluate, experiment.sample
    yield from _doubts_of_optimizer(experiment.optimizer, experiment.schedule.steps)
    yield from _doubts_of_checkpoints(experiment.checkpoints, experiment.schedule.steps)
    yield from _doubts_of_ramps(experiment)
    yield from _doubts_of_sources(experiment.data, experiment.schedule.steps)
    if data.validation.startswith(BUILTIN) and not any(text.startswith(BUILTIN) for text in texts_to_train_on(data.train)):
        yield (
            f"data.validation = {data.validation!r} is not held out of data.train = {describe_texts(data.train)!r}: the validation loss "
            "is that of another text → set data.validation to a part of your text that is not trained on"
        )
    if evaluate.tasks and not evaluate.every:
        yield f"evaluate.tasks has {listed(evaluate.tasks, 'and')}, which evaluate.every = 0 never evaluates → set evaluate.every"
    if evaluate.measure and not evaluate.every:
        yield f"evaluate.measure is {evaluate.measure!r}, which evaluate.every = 0 never calls → set evaluate.every, for example to 50"
    if sample.prompts and not sample.every:
        yield "sample.prompts is not used with sample.every = 0: the sample at the end continues the held-out text → set sample.every"
    if len(recorded := experiment.profile.recorded) > MOST_RECORDED:
        instead = f"{recorded[0]}-{recorded[0] + 2}"
        yield (
            f"profile.steps = {experiment.profile.steps!r} records {len(recorded)} steps, more than {MOST_RECORDED}: all are kept in "
            f"memory until the last one, and make the trace long → use a few, such as {instead}"
        )
    if experiment.precision == "fp16" and 0 < experiment.watch.most_skips < 16:
        yield (
            f"watch.most_skips = {experiment.watch.most_skips} may stop a run in fp16 while it looks for its loss scale, which begins at "
            "2^16 and is halved where steps are skipped → use 20, or 0 for no limit"
        )


def doubts_of_ranks(experiment: Experiment, ranks: Ranks) -> Iterator[str]:
    """What works on these ranks, but is probably slow: tensor ranks on several nodes."""
    tensor, local = experiment.parallel.tensor, ranks.local_world
    if ranks.world > local and local % tensor:
        within = listed([str(degree) for degree in range(1, min(local, tensor) + 1) if local % degree == 0 and tensor % degree == 0], "or")
        yield (
            f"parallel.tensor = {tensor} does not divide the {local} rank{'s' * (local > 1)} of a node, so that activations cross the "
            f"network in every layer → use {within}, and more of parallel.pipe or of ZeRO"
        )


def _doubts_of_optimizer(optimizer: Optimizer, steps: int) -> Iterator[str]:
    fast, slow = optimizer.betas
    if fast > slow:
        yield (
            f"optimizer.betas = {fast:g}, {slow:g}: the gradient's mean is longer than that of its square, the usual order is the "
            f"other → use {slow:g}, {fast:g}"
        )
    if optimizer.lr * optimizer.weight_decay >= 1:
        factor = 1 - optimizer.lr * optimizer.weight_decay
        yield (
            f"optimizer.lr × optimizer.weight_decay = {optimizer.lr:g} × {optimizer.weight_decay:g} multiplies every weight by {factor:g} "
            "in each step → use a smaller one of the two"
        )
    if optimizer.decay not in DECAYS[1:]:  # a decay of variant.py decides for itself
        return
    if optimizer.min_lr == optimizer.lr:
        yield f"optimizer.min_lr = optimizer.lr = {optimizer.lr:g}, so that {optimizer.decay} decays nothing → use a smaller min_lr"
    if optimizer.warmup_steps == steps > 1:
        yield (
            f"optimizer.warmup_steps = {steps} are all of schedule.steps = {steps}, so that {optimizer.decay} has no step left → "
            "use fewer warm-up steps"
        )


def _doubts_of_checkpoints(checkpoints: Checkpoints, steps: int) -> Iterator[str]:
    if checkpoints.every > steps:
        yield f"checkpoints.every = {checkpoints.every} is more than schedule.steps = {steps}: there is none before the end → use fewer"
    if checkpoints.every and checkpoints.keep_every % checkpoints.every:
        kept = math.lcm(checkpoints.every, checkpoints.keep_every)
        yield (
            f"checkpoints.keep_every = {checkpoints.keep_every} is not a multiple of checkpoints.every = {checkpoints.every}: only every "
            f"{kept}th step's checkpoint is kept → use a multiple"
        )


def _doubts_of_ramps(experiment: Experiment) -> Iterator[str]:
    """Ramps that the run does not see the end of."""
    schedule, length = experiment.schedule, experiment.model.seq_length
    ends = {
        f"schedule.batch_ramp reaches schedule.batch_size = {schedule.batch_size}": batch_sizes(schedule).phases[-1].step,
        f"schedule.length_ramp reaches model.seq_length = {length}": sequence_lengths(experiment).phases[-1].step,
    }
    for reaches, step in ends.items():
        if step >= schedule.steps:
            yield f"{reaches} at step {step + 1:,}, the run has {schedule.steps:,} → use fewer samples for the ramp, or more steps"


def _doubts_of_sources(data: Data, steps: int) -> Iterator[str]:
    """Weights that the run never comes to."""
    for source in data.train:
        if isinstance(source, Source) and source.from_step >= steps:
            yield (
                f"data.train gives {source.name!r} the weight {source.weight:g} from step {source.from_step:,} on, the run ends after "
                f"{steps:,} → use an earlier step, or more steps"
            )


def doubts_of_text(experiment: Experiment, tokenizer_size: int, validation_tokens: int) -> Iterator[str]:
    """What is probably not meant, and is known only with the tokenizer and the texts: `validation_tokens` are predicted each time."""
    size, schedule = experiment.model.vocab_size, experiment.schedule
    if tokenizer_size < LEAST_USED * size:
        yield (
            f"model.vocab_size = {size}, but data.tokenizer = {experiment.data.tokenizer!r} has {tokenizer_size} tokens on this text: "
            f"{size - tokenizer_size} rows of the embedding are never used → use model.vocab_size {tokenizer_size}"
        )
    times = math.ceil(schedule.steps / (schedule.validate_every or schedule.steps))
    trained = sequence_lengths(experiment).before(batch_sizes(schedule).before(schedule.steps))
    validated = times * validation_tokens
    if validated > FORWARD * trained:
        fair = max(schedule.batch_size * experiment.model.seq_length, FORWARD * trained // (10 * times))
        yield (
            f"{times} validation{'s' * (times > 1)} of {validation_tokens:,} tokens will take about {validated / FORWARD / trained:.1f} "
            f"times as long as the training on {trained:,} → use schedule.validate_tokens {fair}, or validate less often"
        )


def refused_by_wandb(experiment: Experiment, name: str) -> Iterator[str]:
    """What W&B does not take as project or group, or as the id of a run of the experiment folder `name`."""
    track = experiment.track
    if track.mode == "disabled":
        return
    if wrong := sorted(set(track.project) & set(WANDB_REFUSES["project"])):
        yield f"track.project = {track.project!r}: W&B takes no {listed(wrong)} in the name of a project → leave it out"
    if wrong := sorted(set(name) & set(WANDB_REFUSES["run id"])):
        yield f"the experiment's folder {name!r} names its runs, and W&B takes no {listed(wrong)} in the id of a run → rename the folder"
    if name != name.lstrip():
        yield f"the experiment's folder {name!r} names its runs, and W&B takes no space at the beginning of an id → rename the folder"
    lengths = {"track.project": track.project, "track.group": track.group or "", "the experiment's folder": f"{name}-000000"}
    for what, text in lengths.items():
        if len(text) > LONGEST_NAME:
            yield f"{what} gives W&B a name of {len(text)} characters, it takes {LONGEST_NAME} → use a shorter one"
