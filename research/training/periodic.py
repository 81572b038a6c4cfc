"""Periodic work between two steps: validation, evaluation tasks, samples. Training is bit for bit the same with and without it.

What is due is carried out in a fixed order. What a signal has left undone stays due: the checkpoint says so, and the resumed run
begins with it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from models.config import GPT, chosen
from models.inference.variant_check import UnusableLogits
from models.segments import SEGMENTS
from parallel.engines.engine import Engine
from parallel.engines.micro_batch import MicroBatch
from parallel.errors import Mistake
from research.config import Experiment
from research.config.schema import MEASURE
from research.data.batches import validation_batches
from research.data.confined import segments
from research.data.held_out import HeldOutSamples, held_out_batches
from research.data.prepare import SHARED, HeldOut
from research.evaluation import in_training
from research.evaluation.in_training import PreparedTask
from research.evaluation.task import Metric
from research.reliability.signals import CutShort
from research.tracking.console import Advance, nothing
from research.tracking.metrics import perplexity
from research.training import samples
from research.training.live_model import Live, LiveScorer, write
from research.training.measurement import MeasuredModel, measured_row
from research.training.state import Run

VALIDATION, EVALUATION, SAMPLES = KINDS = ("validation", "evaluation", "samples")
"""In the order in which they are carried out."""


@dataclass(frozen=True)
class Validation:
    """The sum of nats of the tokens of a text, the tokens, and their UTF-8 bytes."""

    nats: float
    tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        """Mean nats a token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Σ nats / (ln 2 · bytes): end-of-text's loss counts, its bytes do not."""
        return self.nats / math.log(2) / self.num_bytes

    @property
    def perplexity(self) -> float:
        """e^loss."""
        return perplexity(self.loss)

    def row(self, group: str = "val") -> dict[str, float]:
        """The keys of metrics.jsonl."""
        values = {"loss": self.loss, "ppl": self.perplexity, "bits_per_byte": self.bits_per_byte, "tokens": self.tokens}
        return {f"{group}/{name}": value for name, value in values.items()}


def validate(
    engine: Engine,
    text: HeldOut | HeldOutSamples,
    seq_length: int,
    end_of_text: int,
    should_continue: Callable[[], bool] = lambda: True,
    advance: Advance = nothing,
) -> Validation | None:
    """Every held-out token, predicted once from at most seq_length tokens before it, or the held-out samples. Collective.

    If training confines attention to each document, so does a validation: `end_of_text` is the token in front of each.
    `should_continue()` is called before each batch and must return the same on every rank. Returns None if it was False.
    """
    grid, settings = engine.grid, engine.settings
    nats, part = 0.0, (settings.micro_batch_size, grid.data_rank, grid.data)
    if isinstance(text, HeldOutSamples):
        batches = held_out_batches(text, *part)
    else:
        batches = validation_batches(text.store.tokens[: text.tokens + 1], seq_length, *part)
    for batch, count in batches:
        if not should_continue():
            return None
        context = batch.context
        if SEGMENTS in engine.context and SEGMENTS not in context:
            context |= {SEGMENTS: segments(batch.ids, end_of_text)}
        nats += engine.evaluate_batch(MicroBatch.of(batch.ids, batch.labels, context)) * count
        advance(count)
    return Validation(nats, text.tokens, text.num_bytes)


def shared_texts(texts: Sequence[HeldOut | HeldOutSamples]) -> list[HeldOut | HeldOutSamples]:
    """The held-out texts that make val/loss: that of data.validation, or of a split of several sources all parts."""
    return [text for text in texts if text.source == SHARED] or list(texts)


def intervals(experiment: Experiment) -> dict[str, int]:
    """Steps between two of each kind; 0: at the end only. A kind that is never done has no entry."""
    found = {VALIDATION: experiment.schedule.validate_every}
    found |= {EVALUATION: experiment.evaluate.every} if experiment.evaluate.every else {}
    return found | ({SAMPLES: experiment.sample.every} if experiment.sample.every else {})


class Periodic:
    """Carries out what is due between two steps. All methods but `state` and `restore` are collective."""

    def __init__(self, run: Run, texts: Sequence[HeldOut | HeldOutSamples], tasks: Sequence[PreparedTask], prompts: Sequence[str]) -> None:
        """`texts` are validated on every schedule.validate_every steps; `tasks` and `prompts` have intervals of their own."""
        self.run, self.texts, self.tasks, self.prompts = run, texts, tasks, prompts
        self.intervals = intervals(run.job.experiment)
        self.best: tuple[float, int] | None = None
        """The lowest bits per byte so far and its step."""
        self.due: list[str] = []
        """What is to be done before the next step; not empty after a step only where a signal has cut it short."""

    def after(self, step: int) -> None:
        """What is due after `step`; after the last one everything, except the sample that the end of a run writes anyway."""
        experiment = self.run.job.experiment
        last = step == experiment.schedule.steps
        due = [kind for kind, every in self.intervals.items() if last or (every and step % every == 0)]
        self.carry_out(kind for kind in due if not (last and kind == SAMPLES and not experiment.sample.prompts))

    def carry_out(self, due: Iterable[str]) -> None:
        """Each kind in turn; `self.due` is what a signal has left. The time it takes is not counted as training time."""
        work = {VALIDATION: self._validate, EVALUATION: self._evaluate, SAMPLES: self._sample}
        self.due = [kind for kind in due if kind in self.intervals]
        while self.due:
            try:
                with self.run.meter.paused(self.due[0]):
                    work[self.due[0]]()
            except CutShort:
                return
            del self.due[0]

    def restore(self, saved: dict[str, Any]) -> None:
        """Sets `best` and `due` as a checkpoint has them. Older checkpoints knew of no other work than validations, of all tokens.

        A best validation on another part of the held-out text is not one to compare with: it is forgotten.
        """
        best, step = saved["best"] or (math.nan, 0)
        comparable = saved.get("validate_tokens", 0) == self.run.job.experiment.schedule.validate_tokens
        self.best = (float(best), int(step)) if math.isfinite(best) and comparable else None
        if "due" in saved:
            self.due = [kind for kind in KINDS if kind in saved["due"]]
        else:
            self.due = [VALIDATION] if saved["validation_due"] else []

    def _validate(self) -> None:
        """Logs one row: val/… of the text that all sources share, or of all parts of a split, and val/NAME/… of each source."""
        run, model = self.run, self.run.job.experiment.model
        found: dict[str, Validation] = {}
        with run.console.progress(VALIDATION, sum(text.tokens for text in self.texts), announced=False) as advance:
            for text in self.texts:
                one = validate(
                    run.engine, text, model.seq_length, run.corpus.tokenizer.end_of_text, lambda: goes_on(run, VALIDATION), advance
                )
                if one is None:
                    raise CutShort
                found[text.source] = one
        shared = [found[text.source] for text in shared_texts(self.texts)]
        whole = Validation(sum(one.nats for one in shared), sum(one.tokens for one in shared), sum(one.num_bytes for one in shared))
        is_best = self.best is None or whole.bits_per_byte < self.best[0]
        if is_best:
            self.best = (whole.bits_per_byte, run.step)
        row = whole.row() | run.axes()
        for source, one in found.items():
            row |= one.row(f"val/{source}") if source != SHARED else {}
        run.tracker.log(row | self._epochs())
        run.console.validation(row, is_best)

    def _epochs(self) -> dict[str, float]:
        """The passes through each of several sources so far, as data/NAME/epochs."""
        sampler, sources = self.run.sampler, list(self.run.corpus.sources)
        passes = sampler.epochs(sampler.samples(self.run.step).start).tolist() if len(sources) > 1 else []
        return {f"data/{name}/epochs": seen for name, seen in zip(sources, passes, strict=False)}

    def _evaluate(self) -> None:
        """Logs one row with the metrics of all tasks and the numbers of the experiment's own measurement, if there are any."""
        run, live = self.run, self._live_model(EVALUATION)
        found = self._evaluated(live)
        measured = self._measured(live)
        if not found and not measured:
            return
        row = run.axes()
        for task, figures in found:
            row |= in_training.metrics_row(task, figures)
        shown = [(task.task.name, figures[0].name, figures[0].value) for task, figures in found]
        row |= measured
        run.tracker.log(row)
        shown += [("measure", name.partition("/")[2], value) for name, value in measured.items()]
        run.console.evaluation(row, shown)

    def _evaluated(self, live: Live) -> list[tuple[PreparedTask, list[Metric]]]:
        """The metrics of every task; none, and a warning, if the model's logits cannot be used."""
        run = self.run
        if not self.tasks:
            return []
        try:
            live.refuse_dependent_logits()
        except UnusableLogits as reason:  # the same on every rank: all see the same scores
            run.console.warn(f"no evaluation after step {run.step}: {reason}")
            return []
        found = []
        for task in self.tasks:
            with run.console.progress(f"evaluating {task.task.name}", announced=False):
                found.append((task, in_training.evaluate_task(task, LiveScorer(live))))
        return found

    def _measured(self, live: Live) -> dict[str, float]:
        """The numbers of `evaluate.measure`; none if the experiment names no function, or if it needs logits that cannot be used."""
        run, name = self.run, self.run.job.experiment.evaluate.measure
        if name is None:
            return {}
        try:
            return measured_row(chosen(MEASURE, name, {}, run.variants), run.step, MeasuredModel(live, run.corpus.tokenizer))
        except UnusableLogits as reason:
            run.console.warn(f"no measurement after step {run.step}: {reason}")
            return {}

    def _sample(self) -> None:
        """Logs a row for each prompt, all or none. Logits that are not finite, or not causal, are reported, and end only the sample."""
        run, settings = self.run, self.run.job.experiment.sample
        choice = samples.sampling_params_of(run.job.experiment)
        live = self._live_model(SAMPLES)
        try:
            live.refuse_dependent_logits()
            with run.console.progress("writing samples", announced=False):
                texts = write(live, run.corpus.tokenizer, self.prompts, settings.tokens, choice, settings.seed)
        except Mistake as mistake:  # the same on every rank: all see the same logits
            run.console.warn(f"no sample after step {run.step}: {mistake}")
            return
        rows = [samples.row(run.axes(), text.prompt, text.text, text.finish) for text in texts]
        run.tracker.samples(rows)
        for row in rows:
            run.console.sample(row["prompt"], row["text"])

    def _live_model(self, kind: str) -> Live:
        model = self.run.job.experiment.model
        assert isinstance(model, GPT)  # research/config/checks.py refuses samples and tasks of other kinds
        return Live(self.run.engine, model, lambda: goes_on(self.run, kind))


def goes_on(run: Run, kind: str) -> bool:
    """Whether no rank was asked to stop; asked between two batches. Collective."""
    run.progress.advance(kind)
    run.note_trouble()
    return not run.stop.agreed()
