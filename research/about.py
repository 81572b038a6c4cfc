"""What W&B is told of a run, and which of the experiment's settings say so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class Tracked(Protocol):
    """The fields of research.config.Track that tracking reads."""

    project: str
    group: str | None

    @property
    def mode(self) -> str:
        """auto, online, offline or disabled; read-only here, so that a schema may allow just these."""


@dataclass(frozen=True)
class About:
    """What a run is, as W&B shows it: the resolved experiment, the DeepSpeed JSON derived from it, the code, family and tags."""

    config: Mapping[str, Any]
    deepspeed: Mapping[str, Any]
    commit: str | None
    dirty: bool
    family: str
    tags: Sequence[str] = field(default=())

    def as_config(self) -> dict[str, Any]:
        """One nested dict. The experiment's fields are on top (W&B's columns are then model.num_layers, optimizer.lr, …)."""
        return {**self.config, "derived_deepspeed": dict(self.deepspeed), "git": {"commit": self.commit, "dirty": self.dirty}}
