"""How far a run that resumes is the run that was never stopped, in words that say no more than is true. Imports no torch."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from parallel.errors import listed
from research.config import Experiment
from research.config.diff import Change, belongs
from research.config.sources import TRAIN
from research.training.schedule import learning_rate

RECORDED = {
    "schedule.validate_every": "validations",
    "schedule.validate_tokens": "validations",
    "schedule.log_every": "rows of metrics.jsonl",
    "evaluate": "evaluations",
    "sample": "samples",
    "watch": "checks of each step",
}
"""Settings that change no step, but what is recorded of it or what an anomaly leads to -> what they change."""


def continuation(
    step: int,
    changes: Sequence[Change],
    now: Experiment,
    layout_and_machine: Mapping[str, tuple[Any, Any]],
    same_code: bool | None,
    device: str,
    variants: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """How far a run that resumes at `step` is the run that was never stopped, in words that say no more than is true.

    `changes` are the settings that differ, `layout_and_machine` what differs of these (parallel/engines/process_state.py).
    `same_code`: None if the checkpoint does not say with which code it was saved, as older ones do not.
    `variants`: what the experiment names of its variant.py, for a decay of its own.
    'bit for bit as if it had never stopped' needs that nothing differs, and a CPU or `deterministic`: some GPU kernels add in no fixed
    order. If `deterministic` was not set before, that is among `layout_and_machine`.
    """
    rounding = [f"{name.partition('.')[2]} {then} → {to}" for name, (then, to) in layout_and_machine.items()]
    rounding += ["other DeepSpeed settings"] * any(belongs(name, ["deepspeed"]) for name, _, _ in changes)
    rounding += ["GPU kernels"] * (device != "cpu" and not now.deterministic)
    exact = f"within rounding ({', '.join(rounding)})" if rounding else "bit for bit"

    then, to = next(((then, to) for name, then, to in changes if name == "schedule.steps"), (now.schedule.steps,) * 2)
    if not _same_rates(now, then, to, range(step), variants):
        said = f"same state, other learning rates from here on ({now.optimizer.decay} over {to} steps, not {then})"
        said += f", {exact}" if rounding else ""
    elif not _same_rates(now, then, to, range(step, min(then, to)), variants):
        said = f"{exact} as if it had been begun with {to} steps"
    elif any(name == TRAIN for name, _, _ in changes):
        said = f"{exact} as if it had been begun with these weights of the sources"
    else:
        said = f"{exact} as if it had never stopped"

    other = dict.fromkeys(what for prefix, what in RECORDED.items() if any(belongs(name, [prefix]) for name, _, _ in changes))
    said += f", with other {listed(other, 'and')}" if other else ""
    if same_code is None:
        return f"{said}, if the code is the one that saved it, which this checkpoint does not say"
    return said if same_code else f"{said}, if the code, which has changed, still computes the same"


def _same_rates(experiment: Experiment, then: int, to: int, steps: Iterable[int], variants: Mapping[str, Any]) -> bool:
    """Whether a run of `then` and one of `to` steps have the same learning rate in each of `steps`."""
    optimizer = experiment.optimizer
    if then == to:
        return True
    return all(learning_rate(step, optimizer, then, variants) == learning_rate(step, optimizer, to, variants) for step in steps)
