"""An experiment's settings: the schema, strict. Science has no defaults, plumbing may. Imports no torch.

Every refusal is a Mistake: one sentence with the dotted name, the value and what would work (research/settings.py).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue, field_validator

from models import config as shapes
from parallel.errors import Mistake
from research.run_folder import write_json
from research.settings import Settings

SCHEMA = 5
"""The version of a saved config.json. A new or changed field raises it and adds a function to MIGRATIONS."""


def _without_dropout(settings: dict[str, Any]) -> dict[str, Any]:
    """1 → 2: models had no dropout. Sequence parallelism and recomputation, new too, are off unless set."""
    if not isinstance(model := settings.get("model"), dict):
        return settings  # what is missing is said when the settings are read
    return {**settings, "model": {f"{place}_dropout": 0.0 for place in ("embedding", "residual", "mlp", "attention")} | model}


def _unwatched(settings: dict[str, Any]) -> dict[str, Any]:
    """2 → 3: one checkpoint, at the end; DeepSpeed skipped what was not finite; nobody looked for hangs or spikes."""
    watch = {"hang_seconds": 0.0, "non_finite": "skip", "most_skips": 0, "spike": 0.0}
    return {"checkpoints": {"every": 0}, "watch": watch} | settings


def _unscaled(settings: dict[str, Any]) -> dict[str, Any]:
    """3 → 4: rotary positions had their own wavelengths; every run began with weights drawn from its seed."""
    if not isinstance(model := settings.get("model"), dict) or model.get("position") != "rotary":
        return settings
    return {**settings, "model": {"rotary_scaling": "none"} | model}


def _unasked(settings: dict[str, Any]) -> dict[str, Any]:
    """4 → 5: in the middle of training nothing was evaluated but the validation text, and nothing written."""
    return {"evaluate": {"every": 0}, "sample": {"every": 0}} | settings


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _without_dropout, 2: _unwatched, 3: _unscaled, 4: _unasked}
"""n -> the function that turns the settings of schema n into those of schema n + 1 with the old behaviour."""

Count = Annotated[int, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class GPT(Settings, shapes.GPT):
    """The network: how many layers of what. GPT-2, GPT-NeoX/Pythia and Llama are settings of it."""

    SECTION: ClassVar[str] = "model"


class Data(Settings):
    """The text that is learned and the text that is held out."""

    SECTION: ClassVar[str] = "data"

    train: Text = Field(description="text to learn: builtin:state_of_the_union/train, or a .txt, .jsonl or .jsonl.xz file")
    validation: Text = Field(description="held-out text, named the same way; never trained on")
    tokenizer: Text = Field(
        description="builtin:bpe-8192 (trained on the train text), builtin:gpt2 or the path of a tokenizer.json; model.vocab_size holds it"
    )
    cache: Text = Field(default=".cache", description="folder for token stores and tokenizers, relative to the repository; safe to delete")


class Schedule(Settings):
    """How long, and how many sequences at a time."""

    SECTION: ClassVar[str] = "schedule"

    steps: Count = Field(description="optimizer steps")
    batch_size: Count = Field(description="sequences a step, over all ranks")
    micro_batch_size: Count = Field(description="sequences a rank passes through the model at once; changes speed and memory only")
    validate_every: int = Field(ge=0, description="steps between validations; 0: only at the end")
    log_every: Count = Field(default=10, description="steps between lines in the terminal and rows in metrics.jsonl")


class Optimizer(Settings):
    """AdamW, and the learning rate as a function of the step."""

    SECTION: ClassVar[str] = "optimizer"

    lr: float = Field(gt=0, description="learning rate at its highest, after the warm-up")
    betas: tuple[Beta, Beta] = Field(strict=False, description="decay of the running means of gradient and squared gradient")
    eps: float = Field(gt=0, description="added to the square root of the squared gradient's mean")
    weight_decay: float = Field(ge=0, description="decoupled weight decay, per step times the learning rate")
    clip: float = Field(ge=0, description="largest global gradient norm; longer gradients are scaled down to it; 0: never")
    decay: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = Field(
        description="learning rate after the warm-up; wsd (warm up, stay, decay): constant, then down in the last decay_steps"
    )
    warmup_steps: int = Field(ge=0, description="steps in which the learning rate rises linearly from 0 to lr; 0: none")
    min_lr: float = Field(ge=0, description="learning rate (not a fraction of lr) at the end of the decay")
    decay_steps: Count | None = Field(default=None, description="length of the final decay in steps, with decay = wsd only")
    label_smoothing: float = Field(ge=0, lt=1, description="probability taken from the true token and spread over the vocabulary; 0: none")


class Parallel(Settings):
    """How the work is cut. Data-parallel size = ranks / (tensor · pipe). It never changes the result, only speed and memory."""

    SECTION: ClassVar[str] = "parallel"

    pipe: Count = Field(default=1, description="pipeline stages: the layers are dealt to this many ranks in turn")
    tensor: Count = Field(default=1, description="tensor ranks: every matrix is sliced over this many; divides heads and ffn_size")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1, description="what data ranks share out: 1 optimizer state, 2 + gradients, 3 + weights; 0 runs as 1; pipe > 1: only 1"
    )
    offload_optimizer: bool = Field(default=False, description="optimizer state in host memory (zero_stage 2 or 3)")
    offload_parameters: bool = Field(default=False, description="weights in host memory (zero_stage 3)")
    sequence: bool = Field(default=False, description="activations between sliced regions cut along the sequence, over the tensor ranks")
    recompute: Literal["none", "selective", "full"] = Field(
        default="none", description="run again in the backward pass instead of kept: nothing, attention's core, whole blocks"
    )


class Checkpoints(Settings):
    """When weights and optimizer state are saved, and which of them stay. A run always saves when it ends or is stopped."""

    SECTION: ClassVar[str] = "checkpoints"

    every: int = Field(default=0, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_last: Count = Field(default=2, description="newest checkpoints that stay")
    keep_every: int = Field(default=0, ge=0, description="checkpoints at multiples of so many steps stay for good; 0: none")
    background: bool = Field(default=False, description="write while training goes on, from a copy in host memory")


class Watch(Settings):
    """What the run looks out for, and what it does then."""

    SECTION: ClassVar[str] = "watch"

    hang_seconds: float = Field(default=600.0, ge=0, description="longest time without progress before the job is ended; 0: never")
    non_finite: Literal["stop", "skip"] = Field(
        default="stop", description="at a loss or gradient that is not finite: stop before the update, or skip the update and go on"
    )
    most_skips: int = Field(
        default=20, ge=0, description="skipped steps in a row before the run stops (fp16 skips some to find its scale); 0: never"
    )
    spike: float = Field(default=0.0, ge=0, description="warn of a loss so many standard deviations above the mean of 100 steps; 0: never")
    on_spike: Literal["warn", "stop"] = Field(default="warn", description="at a spike: only say it, or stop after the step")


class Evaluate(Settings):
    """Tasks that are put to the model while it trains: eval/TASK/METRIC in metrics.jsonl. Training is the same with and without."""

    SECTION: ClassVar[str] = "evaluate"

    every: int = Field(default=0, ge=0, description="steps between evaluations on the tasks, and one at the end; 0: never")
    tasks: tuple[Text, ...] = Field(
        default=(), strict=False, description="what is asked, named as by `python -m research evaluate --tasks list`"
    )
    limit: int = Field(default=0, ge=0, description="examples of each task at most, the first ones; 0: all")
    data: Text | None = Field(default=None, description="folder with wikitext2/ and lambada/, for the tasks that need them")


class Sample(Settings):
    """Texts that the model writes while it trains, into samples.jsonl. Each token costs a pass of the whole model."""

    SECTION: ClassVar[str] = "sample"

    every: int = Field(default=0, ge=0, description="steps between samples; 0: only the one at the end")
    prompts: tuple[str, ...] = Field(default=(), strict=False, description="what is continued; none: how the held-out text begins")
    tokens: Count = Field(default=40, description="tokens after each prompt at most; together they fit into model.seq_length")
    temperature: float = Field(default=0.0, ge=0, description="0: the likeliest token, always; 1: drawn by the model's probabilities")
    top_k: int = Field(default=0, ge=0, description="drawn from the k likeliest; 0: from all")
    top_p: float = Field(default=1.0, gt=0, le=1, description="drawn from the likeliest that have this probability together")
    min_p: float = Field(default=0.0, ge=0, le=1, description="drawn from those at least so many times as likely as the likeliest")
    repetition_penalty: float = Field(default=1.0, gt=0, description="above 1, tokens that were there before become less likely")
    seed: int = Field(default=0, ge=0, description="decides the draws, as generate's --seed; the training's draws are left alone")


class Track(Settings):
    """Where the run is recorded. metrics.jsonl in the run folder is always written; Weights & Biases mirrors it."""

    SECTION: ClassVar[str] = "track"

    project: Text = Field(default="tessera", description="Weights & Biases project")
    mode: Literal["auto", "online", "offline", "disabled"] = Field(default="auto", description="auto: online with an API key, else offline")
    group: Text | None = Field(default=None, description="Weights & Biases group; None: the experiment folder's name")
    runs: Text = Field(default="runs", description="folder that receives NAME/ID/ of every run, relative to the repository")


class Experiment(Settings):
    """One question and everything needed to answer it."""

    question: Text = Field(description="what this run is to answer")
    parent: str | None = Field(description="the experiment folder this one was copied from")
    model: GPT = Field(description="the network")
    init_from: Text | None = Field(
        default=None, description="checkpoint whose weights a run begins with: runs/NAME/ID/checkpoints/step_N; None: drawn from the seed"
    )
    data: Data = Field(description="the text")
    schedule: Schedule = Field(description="how long, how much at a time")
    optimizer: Optimizer = Field(description="AdamW and the learning rate")
    parallel: Parallel = Field(description="how the work is cut")
    precision: Literal["fp32", "bf16", "fp16"] = Field(description="what the model computes in; never switched silently")
    checkpoints: Checkpoints = Field(default_factory=Checkpoints, description="when the state is saved, what stays")
    watch: Watch = Field(default_factory=Watch, description="what the run looks out for")
    evaluate: Evaluate = Field(default_factory=Evaluate, description="tasks while it trains")
    sample: Sample = Field(default_factory=Sample, description="texts while it trains")
    track: Track = Field(default_factory=Track, description="where the run is recorded")
    seed: int = Field(ge=0, description="draws weights and data order; the same on every layout")
    deepspeed: dict[str, JsonValue] = Field(default_factory=dict, description="merged last into the derived DeepSpeed JSON; file only")

    @field_validator("model", mode="before")
    @classmethod
    def _in_our_words(cls, model: Any) -> Any:
        """A plain models.config.GPT is welcome; it becomes one that refuses in our words."""
        return GPT(**dict(model)) if isinstance(model, shapes.GPT) and not isinstance(model, GPT) else model


def resolved(experiment: Experiment) -> dict[str, Any]:
    """The whole experiment as JSON data, headed by its schema number."""
    return {"schema": SCHEMA, **experiment.model_dump(mode="json")}


def build(settings: dict[str, Any]) -> Experiment:
    """The experiment with these settings, groups given as dicts: what `resolved` returned, less `schema`."""
    return Experiment(**settings)


def save(experiment: Experiment, path: Path) -> None:
    """Write config.json in one stroke: a reader finds the old file, the new one or none, never half of one."""
    write_json(path, resolved(experiment))


def load(path: Path) -> Experiment:
    """Read a saved config.json of this schema or an older one. It is data, trusted with nothing."""
    settings = _read(path)
    schema = settings.pop("schema", None)
    if type(schema) is not int or schema < 1:
        raise Mistake(f"{path} has schema = {schema!r} → give it a config.json that a run has written")
    if schema > SCHEMA:
        raise Mistake(f"{path} has schema {schema}, this code reads up to {SCHEMA} → update the code to the version that wrote it")
    for version in range(schema, SCHEMA):
        settings = MIGRATIONS[version](settings)
    try:
        return build(settings)
    except Mistake as mistake:
        raise Mistake(f"{path}: {mistake}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror}) → name a run folder that holds config.json") from None
    except (ValueError, RecursionError) as error:
        raise Mistake(f"{path} is not JSON ({error}) → give it a config.json that a run has written") from None
    if not isinstance(settings, dict):
        raise Mistake(f"{path} holds a {type(settings).__name__} → give it a config.json that a run has written")
    return settings
