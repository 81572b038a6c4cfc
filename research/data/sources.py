"""The texts that data.train and data.validation name: one training text, or several sources with weights, and what is held out.

A setting is a name, a tuple of names that are read as one text, or a tuple of sources (research.config.Source), each with `path`,
`weight`, `from_step`, `name` and `validation`. Several sources are blended (research/data/blend.py).
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Protocol, TypeGuard

from research.data.blend import Stage
from research.data.documents import Spec

SHARED = ""
"""The name of a training text that is no Source, and of the held-out text of data.validation. No Source can have it."""


class Source(Protocol):
    """The fields of research.config.Source that are read here; research/data/ imports no other room."""

    @property
    def path(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def from_step(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def validation(self) -> str | None: ...


class DataSettings(Protocol):
    """The fields of research.config.Data that are read here."""

    @property
    def train(self) -> Spec | Sequence[Source]: ...
    @property
    def validation(self) -> str: ...
    @property
    def tokenizer(self) -> str: ...
    @property
    def cache(self) -> str: ...


def are_sources(train: Spec | Sequence[Source]) -> TypeGuard[Sequence[Source]]:
    """Whether data.train has sources with weights."""
    return not isinstance(train, str) and not isinstance(train[0], str)


def training_texts(train: Spec | Sequence[Source]) -> dict[str, Spec]:
    """The text of each source, by its name, in the order of their first entries."""
    if not are_sources(train):
        return {SHARED: train}  # type: ignore[dict-item]
    return {source.name: source.path for source in train}


def own_held_out_texts(train: Spec | Sequence[Source]) -> dict[str, str]:
    """The held-out texts that sources have of their own, by the names of the sources."""
    entries = train if are_sources(train) else ()
    return {source.name: source.validation for source in entries if source.validation is not None}


def weights_in(train: Spec | Sequence[Source], step: int) -> dict[str, float]:
    """The weight of each source in a step: that of its entry with the latest from_step up to it, or 0."""
    if not are_sources(train):
        return {SHARED: 1.0}
    weights = dict.fromkeys(training_texts(train), 0.0)
    for source in sorted(train, key=attrgetter("from_step")):
        if source.from_step <= step:
            weights[source.name] = source.weight
    return weights


def changes(train: Spec | Sequence[Source]) -> list[int]:
    """The steps from which on weights are given, in order; the first is 0."""
    return sorted({0, *(source.from_step for source in train)}) if are_sources(train) else [0]


def stages(train: Spec | Sequence[Source], samples_before: Callable[[int], int]) -> list[Stage]:
    """The stages of the blend, where `samples_before` a step says how many samples the steps before it have."""
    return [Stage(samples_before(step), tuple(weights_in(train, step).values())) for step in changes(train)]


def same_until(then: Any, now: Any, step: int) -> bool:
    """Whether two settings of data.train give every sample of the first `step` steps the same place in a source of the same name.

    `now` must have all sources of `then`, in their order, but may have more.
    """
    if not (are_sources(then) and are_sources(now)):
        return then == now
    old, new = training_texts(then), training_texts(now)
    if any(new.get(name) != text for name, text in old.items()):
        return False
    if [first for first in changes(then) if first < step] != [first for first in changes(now) if first < step]:
        return False  # the order of a stage depends on its number
    if list(old) != [name for name in new if name in old]:
        return False
    firsts = [first for first in changes(then) if first < step]
    return all(_above_zero(weights_in(then, first)) == _above_zero(weights_in(now, first)) for first in firsts)


def _above_zero(weights: dict[str, float]) -> dict[str, float]:
    return {name: weight for name, weight in weights.items() if weight}
