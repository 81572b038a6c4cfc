"""The schema of an experiment's settings. What affects results has no default; everything else may have one. Imports no torch.

Every error is a Mistake: one sentence with the dotted name, the value and what would work (research/config/settings.py).
"""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue, SerializeAsAny, field_validator, model_validator

from models import config as shapes
from models import encoder_config as encoders
from parallel.errors import listed
from research.config.examples import EXAMPLES, STREAM, ExampleSettings, check_examples
from research.config.settings import LONGEST, Settings, Text
from research.config.sources import Source, check_sources

Count = Annotated[int, Field(gt=0)]
Label = Annotated[str, Field(min_length=1, max_length=64)]
Beta = Annotated[float, Field(ge=0, lt=1)]

LOSSES = ("cross_entropy",)
OPTIMIZERS = ("adamw",)
DECAYS = ("constant", "linear", "cosine", "wsd", "inverse_sqrt")
MEASURE = "evaluate.measure"
TRAINING_VARIANTS = ("loss", "optimizer.name", "optimizer.decay", MEASURE, EXAMPLES)
"""The settings outside of `model` that may name a class or function of the experiment's variant.py."""
SOURCES = "Source(path=…, weight=…)"
STEP_RANGE = re.compile(r"(\d{1,10})(?:-(\d{1,10}))?", re.ASCII)
"""'10-12', or one step."""


class GPT(Settings, shapes.GPT):
    """The network: its layers and their sizes. GPT-2, GPT-NeoX/Pythia, Llama, Mistral, Qwen2 and Qwen3 are settings of it."""

    SECTION: ClassVar[str] = "model"


class BERT(Settings, encoders.BERT):
    """The network: an encoder that predicts masked tokens from both sides. BERT and MegatronBERT are settings of it."""

    SECTION: ClassVar[str] = "model"


class T5(Settings, encoders.T5):
    """The network: an encoder that reads a source, and a decoder that writes a target. T5 and UMT5 are settings of it."""

    SECTION: ClassVar[str] = "model"


MODELS: dict[str, type[GPT] | type[BERT] | type[T5]] = {"gpt": GPT, "bert": BERT, "t5": T5}
"""`model.kind` -> its settings."""


class Data(Settings):
    """The training text, or several with their shares, and the held-out text."""

    SECTION: ClassVar[str] = "data"

    train: Text | tuple[Text, ...] | tuple[Source, ...] = Field(
        description="text to train on: builtin:state_of_the_union/train, a file or folder of text, or store:PREFIX (.bin and .idx); "
        "several files and folders, read as one text; or, in config.py only, several Source(path=…, weight=…)",
    )
    validation: Text = Field(
        description="held-out text, named the same way, or split:969,30,1, a part of the training text; never trained on"
    )
    tokenizer: Text = Field(
        description="builtin:bpe-8192 or builtin:chars (made from the train text), builtin:bytes or builtin:gpt2, each with special tokens "
        "as builtin:bpe-8192+fim (docs/samples.md), or a tokenizer.json's path"
    )
    examples: Text | SerializeAsAny[ExampleSettings] = Field(
        default=STREAM,
        description="how text becomes samples: stream (windows), confined (windows in which attention stays within each document), packed "
        "(whole documents), variant:Class; or, in config.py only, an object of docs/samples.md",
    )
    cache: Text = Field(default=".cache", description="folder for token stores and tokenizers, relative to the repository; safe to delete")

    @field_validator("examples", mode="before")
    @classmethod
    def _is_known(cls, examples: Any) -> Any:
        return check_examples(examples)

    @field_validator("train", mode="before")
    @classmethod
    def _as_sources(cls, train: Any) -> Any:
        """A list of texts or of sources as a tuple, and a list of one text as that text."""
        if isinstance(train, str) and train:
            return train
        if not isinstance(train, list | tuple) or not train:
            raise ValueError(f"data.train = {repr(train)[:LONGEST]} is no text → use the name of a text, several names, or {SOURCES}")
        entries = tuple(Source(**entry) if isinstance(entry, dict) else entry for entry in train)
        sources = [entry for entry in entries if isinstance(entry, Source)]
        for entry in entries:
            if not isinstance(entry, Source) and (sources or not isinstance(entry, str) or not entry):
                shown, what = repr(entry)[:LONGEST], "source with a weight" if sources else "name of a text"
                raise ValueError(f"data.train holds {shown}, which is no {what} → use names alone, or {SOURCES} alone")
        if sources:
            check_sources(sources)
        return entries[0] if len(entries) == 1 and not sources else entries


class Schedule(Settings):
    """How many steps the run trains, and how many sequences at a time."""

    SECTION: ClassVar[str] = "schedule"

    steps: Count = Field(description="optimizer steps")
    batch_size: Count = Field(description="sequences per step, over all ranks")
    batch_ramp: tuple[Count, Count, Count] | None = Field(
        default=None,
        strict=False,
        description="start, increment, samples: steps grow from start sequences by the increment up to batch_size, over so many samples",
    )
    length_ramp: tuple[Count, Count, Count] | None = Field(
        default=None,
        strict=False,
        description="start, increment, samples: sequences grow from start tokens by the increment up to model.seq_length, over so many "
        "samples",
    )
    micro_batch_size: Count = Field(description="sequences that a rank passes through the model at once; changes speed and memory only")
    validate_every: int = Field(ge=0, description="steps between validations; 0: only at the end")
    validate_tokens: int = Field(default=0, ge=0, description="held-out tokens predicted in each validation, the first ones; 0: all")
    log_every: Count = Field(default=10, description="steps between lines in the terminal and rows in metrics.jsonl")


class Optimizer(Settings):
    """The optimizer, and the learning rate as a function of the step."""

    SECTION: ClassVar[str] = "optimizer"

    name: str = Field(default="adamw", description="adamw or variant:Class, which gets lr, betas, eps and weight_decay")
    lr: float = Field(gt=0, description="peak learning rate, reached after the warm-up")
    betas: tuple[Beta, Beta] = Field(strict=False, description="decay of the running means of gradient and squared gradient")
    eps: float = Field(gt=0, description="added to the square root of the squared gradient's mean")
    weight_decay: float = Field(ge=0, description="decoupled weight decay, per step times the learning rate")
    clip: float = Field(ge=0, description="largest global gradient norm; longer gradients are scaled down to it; 0: no clipping")
    decay: str = Field(
        description=f"learning rate after the warm-up: {', '.join(DECAYS)} or variant:function; wsd is constant, then falls in decay_steps"
    )
    warmup_steps: int = Field(ge=0, description="steps in which the learning rate rises linearly from 0 to lr; 0: none")
    min_lr: float = Field(ge=0, description="learning rate (not a fraction of lr) at the end of the decay")
    decay_steps: Count | None = Field(default=None, description="length of the final decay in steps, for wsd and for a decay of your own")
    label_smoothing: float = Field(
        ge=0, lt=1, description="probability taken in training from the true token and spread over the vocabulary; 0: none"
    )

    @model_validator(mode="after")
    def _known(self) -> "Optimizer":
        shapes.refuse_unknown("optimizer.name", self.name, OPTIMIZERS)
        shapes.refuse_unknown("optimizer.decay", self.decay, DECAYS)
        return self


class Parallel(Settings):
    """The layout: data-parallel size = ranks / (tensor · pipe). It changes speed and memory, never the result."""

    SECTION: ClassVar[str] = "parallel"

    pipe: Count = Field(default=1, description="pipeline stages: the layers are split over this many ranks in order")
    tensor: Count = Field(default=1, description="tensor ranks: every matrix is sliced over this many; divides heads and ffn_size")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="partitioned over data ranks: 1 optimizer state, 2 + gradients, 3 + weights; 0 runs as 1; pipe > 1: only 1",
    )
    offload_optimizer: bool = Field(default=False, description="optimizer state in host memory (zero_stage 2 or 3)")
    offload_parameters: bool = Field(default=False, description="weights in host memory (zero_stage 3)")
    sequence: bool = Field(default=False, description="activations between sliced regions split along the sequence over tensor ranks")
    recompute: Literal["none", "selective", "full"] = Field(
        default="none", description="what is recomputed in the backward pass instead of kept: nothing, the attention core, whole blocks"
    )


class Checkpoints(Settings):
    """When weights and optimizer state are saved, and which checkpoints are kept. A run always saves when it ends or is stopped."""

    SECTION: ClassVar[str] = "checkpoints"

    every: int = Field(default=0, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_last: Count = Field(default=2, description="number of newest checkpoints that are kept")
    keep_every: int = Field(default=0, ge=0, description="checkpoints at multiples of this many steps are kept for good; 0: none")
    background: bool = Field(default=False, description="write while training continues, from a copy in host memory")


class Watch(Settings):
    """Hangs, non-finite steps and loss spikes: when they are detected, and what the run then does."""

    SECTION: ClassVar[str] = "watch"

    hang_seconds: float = Field(default=600.0, ge=0, description="longest time without progress before the job is ended; 0: no limit")
    rendezvous_seconds: float = Field(
        default=300.0,
        gt=0,
        description="longest wait at the start until all ranks have met; up to the end of the first step the larger of it and hang_seconds "
        "is the time without progress that ends the job",
    )
    non_finite: Literal["stop", "skip"] = Field(
        default="stop", description="at a loss or gradient that is not finite: stop before the update, or skip the update and continue"
    )
    most_skips: int = Field(
        default=20,
        ge=0,
        description="skipped steps in a row that stop the run (fp16 skips some to find its loss scale); 0: no limit",
    )
    spike: float = Field(default=0.0, ge=0, description="warn of a loss so many standard deviations above the mean of 100 steps; 0: never")
    on_spike: Literal["warn", "stop"] = Field(default="warn", description="at a spike: only warn, or stop after the step")


class Profile(Settings):
    """Steps that are recorded by torch's profiler, in profile/ of the run folder. It does not change the training."""

    SECTION: ClassVar[str] = "profile"

    steps: str | None = Field(default=None, description="first and last step to record, such as 10-12; None: none")
    memory: bool = Field(default=False, description="record as well which operation allocated how much memory in these steps")

    @property
    def recorded(self) -> range:
        """The steps to record, counted from 1; empty for none."""
        if self.steps is None:
            return range(1, 1)
        first, _, last = self.steps.partition("-")
        return range(int(first), int(last or first) + 1)

    @field_validator("steps")
    @classmethod
    def _is_a_range(cls, steps: str | None) -> str | None:
        if steps is None:
            return None
        match = STEP_RANGE.fullmatch(steps)
        if match is None:
            raise ValueError(f"profile.steps = {steps[:LONGEST]!r} is not a range of steps → write FIRST-LAST, such as 10-12")
        first, last = int(match[1]), int(match[2] or match[1])
        if first < 1:
            raise ValueError(f"profile.steps = {steps!r} begins at step {first}, steps are counted from 1 → use 1-{max(1, last)}")
        if last < first:
            raise ValueError(f"profile.steps = {steps!r} ends at step {last}, before it begins at step {first} → use {last}-{first}")
        return steps


class Evaluate(Settings):
    """Tasks and a measurement during training, logged as eval/TASK/METRIC and measure/NAME. They do not change the training."""

    SECTION: ClassVar[str] = "evaluate"

    every: int = Field(default=0, ge=0, description="steps between evaluations, with one more at the end; 0: never")
    tasks: tuple[Text, ...] = Field(
        default=(), strict=False, description="the tasks, named as by `python -m research evaluate --tasks list`"
    )
    limit: int = Field(default=0, ge=0, description="most examples of each task, the first ones; 0: all")
    measure: str | None = Field(default=None, description="variant:function, called as function(step, model); its numbers are logged")
    data: Text | None = Field(default=None, description="folder with wikitext2/ and lambada/, for the tasks that need these files")

    @model_validator(mode="after")
    def _known(self) -> "Evaluate":
        if self.measure is not None:
            shapes.refuse_unknown(MEASURE, self.measure, ())
        return self


class Sample(Settings):
    """Texts generated during training, written to samples.jsonl. Each token costs a forward pass of the whole model."""

    SECTION: ClassVar[str] = "sample"

    every: int = Field(default=0, ge=0, description="steps between samples; 0: only the one at the end")
    prompts: tuple[str, ...] = Field(default=(), strict=False, description="prompts to continue; none: the beginning of the held-out text")
    tokens: Count = Field(default=40, description="most tokens generated after a prompt; both together must fit into model.seq_length")
    temperature: float = Field(default=0.0, ge=0, description="0: always the most likely token; 1: sampled from the model's probabilities")
    top_k: int = Field(default=0, ge=0, description="sample from the k most likely tokens; 0: from all")
    top_p: float = Field(default=1.0, gt=0, le=1, description="sample from the most likely tokens that together have this probability")
    min_p: float = Field(default=0.0, ge=0, le=1, description="sample from tokens at least this many times as likely as the most likely")
    repetition_penalty: float = Field(default=1.0, gt=0, description="above 1, tokens that occurred before become less likely")
    seed: int = Field(default=0, ge=0, description="seed of the sampling, as generate's --seed; training is not affected")


class Track(Settings):
    """Where the run is recorded. metrics.jsonl in the run folder is always written; Weights & Biases holds a copy."""

    SECTION: ClassVar[str] = "track"

    project: Text = Field(default="tessera", description="Weights & Biases project")
    mode: Literal["auto", "online", "offline", "disabled"] = Field(default="auto", description="auto: online with an API key, else offline")
    group: Text | None = Field(default=None, description="Weights & Biases group; None: the experiment folder's name")
    tags: tuple[Label, ...] = Field(default=(), strict=False, description="Weights & Biases tags, beside the layout and the precision")
    job_type: Label = Field(default="train", description="Weights & Biases job type")
    runs: Text = Field(default="runs", description="folder that receives NAME/ID/ of every run, relative to the repository")


class Experiment(Settings):
    """One question and everything needed to answer it."""

    question: Text = Field(description="the question that this run answers")
    parent: str | None = Field(description="the experiment folder that this one was copied from")
    changes: tuple[Text, ...] = Field(
        default=(),
        strict=False,
        description="what differs from the parent: settings that affect results, and variant.py; `python -m research check` compares",
    )
    model: GPT | BERT | T5 = Field(description="the network")
    init_from: Text | None = Field(
        default=None, description="checkpoint with the initial weights: runs/NAME/ID/checkpoints/step_N; None: initialised from the seed"
    )
    data: Data = Field(description="the training and validation text")
    schedule: Schedule = Field(description="number of steps, batch size, intervals")
    optimizer: Optimizer = Field(description="the optimizer and the learning rate")
    parallel: Parallel = Field(description="the layout on ranks")
    loss: str = Field(default="cross_entropy", description="what training minimises: cross_entropy or variant:Class")
    precision: Literal["fp32", "bf16", "fp16"] = Field(description="number format of the computation; never switched silently")
    checkpoints: Checkpoints = Field(default_factory=Checkpoints, description="when checkpoints are saved, which are kept")
    watch: Watch = Field(default_factory=Watch, description="detection of hangs, non-finite steps and spikes")
    evaluate: Evaluate = Field(default_factory=Evaluate, description="evaluation during training")
    sample: Sample = Field(default_factory=Sample, description="text generation during training")
    track: Track = Field(default_factory=Track, description="where the run is recorded")
    profile: Profile = Field(default_factory=Profile, description="steps recorded by torch's profiler")
    deterministic: bool = Field(
        default=False, description="only GPU kernels that add in a fixed order, which are slower; on a CPU every kernel does"
    )
    seed: int = Field(ge=0, description="seed of initial weights and data order, which are the same on every layout")
    deepspeed: dict[str, JsonValue] = Field(default_factory=dict, description="merged last into the derived DeepSpeed JSON; file only")

    @model_validator(mode="after")
    def _known(self) -> "Experiment":
        shapes.refuse_unknown("loss", self.loss, LOSSES)
        return self

    @field_validator("model", mode="before")
    @classmethod
    def _as_settings(cls, model: Any) -> Any:
        """Turns a table of config.json, or a plain models.config.GPT, into the settings of its kind, whose errors are Mistakes."""
        if isinstance(model, shapes.GPT | encoders.BERT | encoders.T5):
            return model if isinstance(model, Settings) else MODELS[model.kind](**model.model_dump())
        if not isinstance(model, dict):
            return model
        kind = model.get("kind", GPT.model_fields["kind"].default)
        if kind not in MODELS:
            raise ValueError(f"model.kind = {repr(kind)[:LONGEST]} is no kind of model → use {listed([*MODELS])}")
        return MODELS[kind](**model)
