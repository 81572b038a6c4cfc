"""Compares the runs of several sides, seed by seed, with those of the first side, the baseline. Imports no torch.

What means nothing is refused with the reason: no common seed, another held-out text, another tokenizer for nats per token, a metric that
is not there. What means less than it seems is a warning: other parameters, tokens or steps, or several settings changed at once.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from parallel.errors import Mistake, listed, listed_up_to, nearest
from research.ablation import statistics
from research.ablation.comparable import refuse_incomparable
from research.ablation.difference import read_variant, unified_diff
from research.ablation.sides import FLOPS, MOST, FinishedRun, Side
from research.ablation.statistics import Effect, Verdict
from research.config.diff import PLUMBING, Change, belongs, diff
from research.config.experiment_folder import VARIANTS, variant_names
from research.tracking import format as fmt
from research.tracking.format import plural
from research.tracking.plot import X_AXES, XAxis, keys_of, points

METRIC = "val/bits_per_byte"
LOWER = ("loss", "ppl", "perplexity", "bits_per_byte", "word_perplexity", "byte_perplexity", "step_ms", "data_ms", "memory_mb", "host_mb")
HIGHER = (
    *("accuracy", "acc", "acc_norm", "f1", "mcc", "bleu", "chrf", "exact_match", "exact_lines", "edit_similarity"),
    *("pass@1", "pass@10", "pass@100", "tokens_per_second", "mfu"),
)
FINAL, BEST = "final", "best"
AXES = X_AXES | {"flops": XAxis(FLOPS, "model FLOPs of training", fmt.flops)}
"""What runs can have spent equally."""


@dataclass(frozen=True)
class Question:
    """What is compared."""

    metric: str = METRIC
    at: str = "tokens"
    """The axis on which runs are brought to the same place: a key of AXES."""
    value: str = FINAL
    """FINAL, the value at the place where the shortest run ends, or BEST, the best value up to there."""
    better: str | None = None
    """'lower' or 'higher'; None: as the metric's name says."""
    smallest: float | None = None
    """The effect for which seeds are proposed; None: the one that is observed."""

    @property
    def axis(self) -> XAxis:
        """The axis of `at`."""
        return AXES[self.at]

    @property
    def higher_is_better(self) -> bool:
        """A Mistake if neither `better` nor the metric's name says it."""
        words = {self.better, *self.metric.split("/")}
        if self.better is None and not words & {*LOWER, *HIGHER}:
            raise Mistake(f"whether a higher {self.metric} is better is not known → add --better lower or --better higher")
        return self.better == "higher" or (self.better is None and bool(words & {*HIGHER}))


@dataclass(frozen=True)
class Values:
    """A run's metric at the place where all runs are compared."""

    final: float
    best: float

    def of(self, question: Question) -> float:
        """The one that is asked for."""
        return self.final if question.value == FINAL else self.best


@dataclass(frozen=True)
class Variant:
    """One side beside the baseline."""

    side: Side
    seeds: tuple[int, ...]
    """Those that it shares with the baseline, in order."""
    differences: tuple[float, ...]
    """Variant − baseline, for each of these seeds."""
    effect: Effect
    adjusted_p: float
    """By Holm, over all variants."""
    verdict: Verdict
    target: float
    """The size of the effect that `more_seeds` is about."""
    more_seeds: int | None
    """How many more seeds would tell it, 0 if these would have; None if not known, more than can be had, or better or worse is told."""
    changes: tuple[Change, ...]
    """Settings that affect results, baseline → variant."""
    plumbing: tuple[Change, ...]
    """Settings that do not, without names and notes."""
    code: str
    """The unified diff of variant.py, if the settings name something of it; '' if it is the same."""
    warnings: tuple[str, ...]
    text_stderr: float | None = None
    """The standard error of the mean difference over windows of the held-out text, in units of the metric; None: not computed."""


@dataclass(frozen=True)
class Comparison:
    """What is known of the sides."""

    question: Question
    baseline: Side
    variants: tuple[Variant, ...]
    values: dict[str, dict[int, Values]]
    """Label -> seed -> values, of all runs of all sides."""
    place: float
    """Where on the axis of the question all runs are compared."""
    cut: tuple[str, ...]
    """Labels of the sides that go on beyond it."""
    warnings: tuple[str, ...]

    @property
    def sides(self) -> list[Side]:
        """The baseline and the variants."""
        return [self.baseline, *(variant.side for variant in self.variants)]

    def numbers(self, side: Side, value: str) -> list[float]:
        """The final or best values of a side, by seed."""
        return [getattr(values, value) for values in self.values[side.label].values()]


def compare(sides: Sequence[Side], question: Question) -> Comparison:
    """Compares every side with the first one. A Mistake says why they cannot be compared."""
    _refuse_few(sides)
    baseline, *others = sides
    runs = [run for side in sides for run in side.runs.values()]
    for run in runs:
        _refuse_missing_metric(run, question.metric)
        _refuse_uncounted(run, question.at)
    higher = question.higher_is_better
    for run in runs:
        refuse_incomparable(baseline.first, run, question.metric)
    shared = [_shared_seeds(baseline, side) for side in others]
    ends = {side.label: [_curve(run, question)[0][-1] for run in side.runs.values()] for side in sides}
    place = min(min(end) for end in ends.values())
    values = {side.label: {seed: _values(run, question, place) for seed, run in side.runs.items()} for side in sides}

    differences = [
        tuple(values[side.label][seed].of(question) - values[baseline.label][seed].of(question) for seed in seeds)
        for side, seeds in zip(others, shared, strict=True)
    ]
    effects = [statistics.paired(difference) for difference in differences]
    adjusted = statistics.holm([effect.p for effect in effects])
    variants = []
    for side, seeds, difference, effect, p in zip(others, shared, differences, effects, adjusted, strict=True):
        verdict = statistics.verdict(effect, p, higher)
        target = abs(effect.mean) if question.smallest is None else question.smallest
        more = _more_seeds(effect, target, len(others)) if verdict is Verdict.NOT_DISTINGUISHABLE else None
        changes, plumbing, code = _changes(baseline.first, side.first)
        warnings = (*_warnings(baseline, side, question.at), *_warnings_of_changes(baseline.first, side.first, changes, code))
        variants.append(Variant(side, seeds, difference, effect, p, verdict, target, more, changes, plumbing, code, warnings))
    tolerance = 1e-9 * place
    cut = tuple(label for label, end in ends.items() if max(end) > place + tolerance) if question.at != "seconds" else ()
    return Comparison(question, baseline, tuple(variants), values, place, cut, tuple(w for side in sides for w in side.warnings))


def _refuse_few(sides: Sequence[Side]) -> None:
    if len(sides) < 2:
        raise Mistake("compare needs two sides or more → name them: python -m research compare gpt_sotu gpt_sotu_dyt")
    sides_of: dict[str, Side] = {}
    for side in sides:
        for run in side.runs.values():
            if (other := sides_of.setdefault(str(run.folder.path.resolve()), side)) is not side:
                raise Mistake(f"{run.folder.title} is in two sides, {other.label} and {side.label} → name each run once")


def _refuse_missing_metric(run: FinishedRun, metric: str) -> None:
    there = keys_of(run.rows)
    if metric not in there:
        near = nearest(metric, there)
        way_out = f"did you mean {near}?" if near else f"use {listed_up_to(there, 8)}" if there else "name runs that have logged a step"
        raise Mistake(f"{run.folder.title} has no row with {metric} → {way_out}")


def _refuse_uncounted(run: FinishedRun, at: str) -> None:
    if at == "flops" and run.flops is None:
        raise Mistake(
            f"--at flops: no formula counts the FLOPs of {run.folder.title}, which has a class of variant.py or a schedule.length_ramp "
            "→ use tokens, steps or seconds"
        )


def _shared_seeds(baseline: Side, side: Side) -> tuple[int, ...]:
    shared = tuple(seed for seed in baseline.runs if seed in side.runs)
    if not shared:
        own, other = (listed_up_to(one.runs, 5) for one in (baseline, side))
        raise Mistake(
            f"{baseline.label} and {side.label} have no seed in common, {own} and {other}: runs are paired by seed → "
            f"train {side.label} with --seed {baseline.first.seed}"
        )
    return shared


def _curve(run: FinishedRun, question: Question) -> tuple[np.ndarray, np.ndarray]:
    """The metric of a run over the axis, which rises."""
    xs, ys = points(run.rows, question.metric, question.axis.key)
    if not xs:
        raise Mistake(f"{run.folder.title} has no row with {question.metric} and {question.axis.key} → use another --at")
    return np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)


def _values(run: FinishedRun, question: Question, place: float) -> Values:
    """The metric at `place`, interpolated between two rows if none is there, and the best value up to there."""
    xs, ys = _curve(run, question)
    if place < xs[0]:
        first, end = question.axis.tick(float(xs[0])), question.axis.tick(place)
        raise Mistake(
            f"{run.folder.title} has its first row with {question.metric} at {first}, after the end of another run at {end} "
            f"({question.axis.label}) → use another --at, or runs with a smaller schedule.validate_every"
        )
    final = float(np.interp(place, xs, ys)) if place < xs[-1] else float(ys[-1])
    if not math.isfinite(final):
        raise Mistake(
            f"{question.metric} of {run.folder.title}, seed {run.seed}, is {final} at the end: no mean over seeds contains it → "
            "that it diverged is the result; compare the other runs by naming them one by one"
        )
    upto = [float(y) for x, y in zip(xs, ys, strict=True) if x <= place and math.isfinite(y)] + [final]
    return Values(final, max(upto) if question.higher_is_better else min(upto))


def _more_seeds(effect: Effect, target: float, tests: int) -> int | None:
    if effect.n < 2:
        return None
    needed = statistics.seeds_needed(target, effect.deviation, tests)
    return None if needed is None else max(0, needed - effect.n)


def _changes(baseline: FinishedRun, variant: FinishedRun) -> tuple[tuple[Change, ...], tuple[Change, ...], str]:
    """Settings that affect results, settings that do not, and the unified diff of variant.py."""
    changes = [change for change in diff(baseline.experiment, variant.experiment) if change[0] != "seed"]
    science = tuple(change for change in changes if not belongs(change[0], PLUMBING))
    unsaid = ("schema", "question", "parent", "changes", "track")
    plumbing = tuple(change for change in changes if change not in science and not belongs(change[0], unsaid))
    names = [variant_names(run.experiment) for run in (baseline, variant)]
    then, now = (read_variant(run.folder.source) if name else None for name, run in zip(names, (baseline, variant), strict=True))
    code = "\n".join(unified_diff(then, now, baseline.folder.title, variant.folder.title))
    return science, plumbing, code


def _warnings(baseline: Side, side: Side, at: str) -> Iterator[str]:
    """What makes the two sides unequal beside what is asked about."""
    a, b = baseline.first, side.first
    counts = [run.parameters for run in (a, b)]
    if None in counts and a.experiment.model != b.experiment.model:
        yield f"whether {side.label} has as many parameters as {baseline.label} is not known: it has no checkpoint that says so"
    elif counts[0] != counts[1] and counts[0] and counts[1]:
        percent = 100 * (counts[1] - counts[0]) / counts[0]
        yield f"{side.label} has {counts[1]:,} parameters, {baseline.label} {counts[0]:,} ({percent:+.2f} %)"
    flops = [run.flops for run in (a, b)]
    if None in flops and a.experiment.model != b.experiment.model:
        yield f"whether {side.label} takes as many FLOPs as {baseline.label} is not known: a class of variant.py is counted by no formula"
    elif flops[0] != flops[1] and flops[0] and flops[1]:
        percent = 100 * (flops[1] - flops[0]) / flops[0]
        yield f"{side.label} is trained with {fmt.flops(flops[1])} FLOPs, {baseline.label} with {fmt.flops(flops[0])} ({percent:+.2f} %)"
    for what, key in (("trains on", "progress/tokens"), ("takes", "progress/step")):
        last = [max(points(run.rows, key, key)[0], default=0) for run in (a, b)]
        if last[0] != last[1]:
            unit = "tokens" if key == "progress/tokens" else "steps"
            yield f"{side.label} {what} {last[1]:,} {unit}, {baseline.label} {last[0]:,}"
    if at == "seconds" and (other := [key for key in ("host", "layout", "precision") if a.record.get(key) != b.record.get(key)]):
        yield f"{side.label} and {baseline.label} have other values of {listed(other, 'and')} in run.json: seconds are those of a machine"
    unpaired = sorted({*baseline.runs} ^ {*side.runs})
    if unpaired:
        yield f"seed {listed(unpaired, 'and')} of {baseline.label} and {side.label} has no partner and is left out of the difference"


def _warnings_of_changes(baseline: FinishedRun, variant: FinishedRun, changes: Sequence[Change], code: str) -> Iterator[str]:
    """Several changes at once, and changes that the fork does not declare."""
    names = [name for name, _, _ in changes] + ([VARIANTS] if code and not any(_names_code(change) for change in changes) else [])
    if len(names) > 1:
        yield f"{plural(len(names), 'setting')} differ at once, {listed_up_to(names, MOST)}: the difference is that of all together"
    declared: Sequence[str] = getattr(variant.experiment, "changes", ())
    is_fork = variant.experiment.parent is not None and variant.experiment.parent.rpartition("/")[2] == baseline.folder.name
    undeclared = [name for name in names if declared and is_fork and not belongs(name, declared)]
    if undeclared:
        yield f"{variant.folder.name} declares changes = {listed(declared, 'and')}, but {listed(undeclared, 'and')} differs as well"


def _names_code(change: Change) -> bool:
    return any(isinstance(value, str) and value.startswith("variant:") for value in change[1:])
