"""How text becomes samples: the values of data.examples. Imports no torch, and nothing of research/data/.

A word, 'stream', 'confined' or 'packed'; an object of one of the classes of KINDS, in config.py only; or 'variant:Class'.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from parallel.errors import listed, nearest
from research.config.settings import LONGEST, Settings, Text

EXAMPLES = "data.examples"
STREAM, CONFINED, PACKED = WORDS = ("stream", "confined", "packed")
VARIANT = "variant:"
Rate = Annotated[float, Field(ge=0, le=1)]


class ExampleSettings(Settings):
    """The base class of the objects. `kind` tells them apart in a config.json."""

    SECTION: ClassVar[str] = EXAMPLES

    kind: str

    @property
    def confines(self) -> bool:
        """Whether attention is confined to parts of a sample, whose numbers then travel through the model."""
        return False

    @property
    def options(self) -> dict[str, Any]:
        """The settings without `kind`: what the class of the samples takes beside the store."""
        return self.model_dump(exclude={"kind"})


class FillInMiddle(ExampleSettings):
    """Windows of the stream in which a share of the documents is rearranged, so that a model learns to fill in a middle."""

    kind: Literal["fill_in_middle"] = Field(default="fill_in_middle", description="the class of examples")
    rate: Rate = Field(description="share of the documents that are rearranged; 0: none, 1: all that can be")
    spm_rate: Rate = Field(description="share of the rearranged documents whose suffix comes first; of the others the prefix does")
    confine: bool = Field(description="attention confined to each document")
    prefix: Text = Field(default="<fim_prefix>", description="the token in front of the prefix")
    suffix: Text = Field(default="<fim_suffix>", description="the token in front of the suffix")
    middle: Text = Field(default="<fim_middle>", description="the token in front of the middle")

    @property
    def confines(self) -> bool:
        """As in ExampleSettings."""
        return self.confine

    @model_validator(mode="after")
    def _different(self) -> "FillInMiddle":
        if len({self.prefix, self.suffix, self.middle}) < 3:
            raise ValueError(
                f"{EXAMPLES}: prefix = {self.prefix!r:.60}, suffix = {self.suffix!r:.60} and middle = {self.middle!r:.60} are not three "
                "tokens → give each its own"
            )
        return self


class Spans(ExampleSettings):
    """Windows of the stream in which spans are replaced by sentinels, and the spans as what is to be predicted (T5)."""

    kind: Literal["spans"] = Field(default="spans", description="the class of examples")
    rate: float = Field(gt=0, lt=1, description="share of the tokens that are replaced; T5: 0.15")
    mean_length: float = Field(ge=1, description="mean length of the spans, in tokens; T5: 3")
    sentinels: Text = Field(default="<extra_id_{}>", description="the tokens that stand for the spans of a sample, {} being 0, 1, 2, …")

    @model_validator(mode="after")
    def _numbered(self) -> "Spans":
        if self.sentinels.count("{}") != 1:
            raise ValueError(f"{EXAMPLES}.sentinels = {self.sentinels!r:.60} has no place for a number → write it as <extra_id_{{}}>")
        return self


class Masked(ExampleSettings):
    """Windows of the stream in which a share of the tokens is to be predicted, most of them masked (BERT)."""

    kind: Literal["masked"] = Field(default="masked", description="the class of examples")
    rate: float = Field(gt=0, lt=1, description="share of the tokens that are predicted; BERT: 0.15")
    mask: Text = Field(default="<mask>", description="the token that masks; it stands for 80 % of them, another one for 10 %")
    sentence_order: bool = Field(
        default=False, description="each sample is two sentences, half of the samples in the wrong order, for a model with sentence_head"
    )


class Supervised(ExampleSettings):
    """Whole conversations packed into samples: the stores of `prepare --supervised`."""

    kind: Literal["supervised"] = Field(default="supervised", description="the class of examples")
    train_on: Literal["responses", "all"] = Field(description="the tokens whose loss counts: those of responses, or all")

    @property
    def confines(self) -> bool:
        """As in ExampleSettings."""
        return True


KINDS: dict[str, type[ExampleSettings]] = {
    "fill_in_middle": FillInMiddle,
    "supervised": Supervised,
    "spans": Spans,
    "masked": Masked,
}
"""`kind` -> its class."""


MODELS_OF_EXAMPLES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*WORDS, "fill_in_middle", "supervised"), ("gpt",)),
    "spans": ("t5",),
    "masked": ("bert",),
}
"""A word, or a kind of examples -> the kinds of models that it is for."""


def kinds_for(examples: str | ExampleSettings) -> tuple[str, ...]:
    """The kinds of models that these samples are for; empty for a class of variant.py, which decides for itself."""
    return MODELS_OF_EXAMPLES.get(examples if isinstance(examples, str) else examples.kind, ())


def describe_examples(examples: str | ExampleSettings) -> str:
    """'packed', or 'FillInMiddle(rate=0.5, spm_rate=0.5, …)'."""
    if isinstance(examples, str):
        return examples
    return f"{type(examples).__name__}({', '.join(f'{name}={value!r}' for name, value in examples.options.items())})"


def check_examples(examples: Any) -> Any:
    """The value of data.examples, an object where config.json has a table. A ValueError with a sentence if it is none."""
    if isinstance(examples, dict):
        kind = examples.get("kind")
        if kind not in KINDS:
            raise ValueError(f"data.examples.kind = {repr(kind)[:LONGEST]} is no kind of examples → use {listed([*KINDS])}")
        return KINDS[kind](**examples)
    if isinstance(examples, str) and not examples.startswith(VARIANT) and examples not in WORDS:
        near = nearest(examples, WORDS)
        way_out = f"did you mean {near!r}?" if near else f"use {listed(WORDS)}, an object of docs/samples.md, or variant:Class"
        raise ValueError(f"data.examples = {examples[:LONGEST]!r} is no kind of examples → {way_out}")
    return examples
