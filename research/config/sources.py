"""Several texts to train on, each with its share of the samples: the entries of data.train. Imports no torch."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from research.config.settings import LONGEST, Settings, Text

TRAIN = "data.train"
SOURCE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")
SPLITS = ("builtin", "store", "train", "val", "valid", "validation", "test")
"""Words of a path that do not tell one text from another."""


class Source(Settings):
    """One of several texts to train on, with its share of the samples from a step on. A later entry of the same name gives it another."""

    SECTION: ClassVar[str] = TRAIN

    path: Text = Field(description="the text, named as data.train is")
    weight: float = Field(ge=0, description="its share of the samples, relative to the other weights; 0: it is left out")
    from_step: int = Field(default=0, ge=0, description="the step, counted from 0, from which on it has this weight")
    name: str = Field(
        default="",
        max_length=64,
        description="what its metrics are called, val/NAME/loss; '': the last word of the path that is not a split's",
    )
    validation: Text | None = Field(
        default=None, description="held-out text of this source, for val/NAME/…, beside data.validation, which all sources share"
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, settings: Any) -> Any:
        """Gives a source without a name the one that its path suggests."""
        if isinstance(settings, dict) and not settings.get("name") and isinstance(settings.get("path"), str):
            return {**settings, "name": suggested_name(settings["path"])}
        return settings

    @field_validator("name")
    @classmethod
    def _is_part_of_a_key(cls, name: str) -> str:
        if not SOURCE_NAME.fullmatch(name):
            raise ValueError(f"data.train.name = {name[:LONGEST]!r} cannot be part of val/NAME/loss → use letters, digits, _, - and .")
        return name


def suggested_name(path: str) -> str:
    """'code' for 'store:corpora/code/train', 'builtin:code/train' and 'texts/code.jsonl.gz'."""
    stems = [part.partition(".")[0] for part in re.split(r"[/:]", path)]
    words = [word for stem in stems if (word := re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-"))]
    named = [word for word in words if word not in SPLITS] or words or ["text"]
    return named[-1][:64]


def check_sources(sources: Sequence[Source]) -> None:
    """Refuses sources that contradict each other."""
    seen: dict[str, Source] = {}
    for source in sources:
        first = seen.setdefault(source.name, source)
        if first.path != source.path:
            raise ValueError(
                f"data.train has two sources of the name {source.name!r}, {first.path!r:.60} and {source.path!r:.60} → give one of them "
                "a name: Source(…, name=…)"
            )
        if source.validation not in (None, first.validation) and first.validation is not None:
            raise ValueError(
                f"data.train: {source.name!r} has two held-out texts, {first.validation!r:.60} and {source.validation!r:.60} → name one"
            )
    places = Counter((source.name, source.from_step) for source in sources)
    name, step = max(places, key=lambda place: places[place])
    if places[name, step] > 1:
        raise ValueError(f"data.train gives {name!r} two weights from step {step} on → leave one of them out, or give it another from_step")


def texts_to_train_on(train: str | Sequence[str] | Sequence[Source]) -> list[str]:
    """The names of all texts of data.train, each once."""
    if isinstance(train, str):
        return [train]
    return list(dict.fromkeys(entry.path if isinstance(entry, Source) else entry for entry in train))


def own_held_out_texts(train: str | Sequence[str] | Sequence[Source]) -> list[tuple[str, str]]:
    """(the setting in words, the name of the text) of each held-out text that a source has of its own."""
    sources = [entry for entry in train if isinstance(entry, Source)]
    return [(f"the validation of {source.name!r}", source.validation) for source in sources if source.validation is not None]


def describe_texts(train: str | Sequence[str] | Sequence[Source]) -> str:
    """data.train in words: 'a.txt', 'a.txt, b.txt', or '0.7 web + 0.3 code' (from step 100 on 0.5 web)."""
    if isinstance(train, str):
        return train
    sources = [entry for entry in train if isinstance(entry, Source)]
    if not sources:
        return ", ".join(map(str, train))
    words = [" + ".join(f"{source.weight:g} {source.name}" for source in sources if not source.from_step)]
    for step in sorted({source.from_step for source in sources} - {0}):
        now = " + ".join(f"{source.weight:g} {source.name}" for source in sources if source.from_step == step)
        words.append(f"from step {step} on {now}")
    return ", ".join(words)
