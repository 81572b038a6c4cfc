"""How text becomes samples: the values of data.examples. Imports no torch, and nothing of research/data/.

A word, 'stream', 'confined' or 'packed'; an object of one of the classes of KINDS, in config.py only; or 'variant:Class'.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from parallel.errors import listed, nearest
from research.config.settings import LONGEST, Settings

EXAMPLES = "data.examples"
STREAM, CONFINED, PACKED = WORDS = ("stream", "confined", "packed")
VARIANT = "variant:"


class ExampleSettings(Settings):
    """The base class of the objects. `kind` tells them apart in a config.json."""

    SECTION: ClassVar[str] = EXAMPLES

    kind: str


class Supervised(ExampleSettings):
    """Whole conversations packed into samples: the stores of `prepare --supervised`."""

    kind: Literal["supervised"] = Field(default="supervised", description="the class of examples")
    train_on: Literal["responses", "all"] = Field(description="the tokens whose loss counts: those of responses, or all")


KINDS: dict[str, type[ExampleSettings]] = {}
"""`kind` -> its class."""


def describe_examples(examples: str | ExampleSettings) -> str:
    """'packed', or 'FillInMiddle(rate=0.5, spm_rate=0.5)': an object with the settings that are not its defaults."""
    return examples if isinstance(examples, str) else repr(examples)


def check_examples(examples: Any) -> Any:
    """The value of data.examples, an object where config.json has a table. A ValueError with a sentence if it is none."""
    if isinstance(examples, dict):
        kind = examples.get("kind")
        if kind not in KINDS:
            raise ValueError(f"data.examples.kind = {repr(kind)[:LONGEST]} is no kind of examples → use {listed([*KINDS])}")
        return KINDS[kind](**examples)
    if isinstance(examples, str) and not examples.startswith(VARIANT) and examples not in WORDS:
        near = nearest(examples, WORDS)
        way_out = (
            f"did you mean {near!r}?" if near else f"use {listed(WORDS)}, an object such as those in docs/samples.md, or variant:Class"
        )
        raise ValueError(f"data.examples = {examples[:LONGEST]!r} is no kind of examples → {way_out}")
    return examples
