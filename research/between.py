"""Between two steps: the held-out text, the tasks, the samples. Training is the same with and without.

What is due is carried out in one order. What is left when a signal comes stays due: the checkpoint says so, and the resumed run
begins with it.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from parallel.errors import Mistake
from research import exams, samples, validation
from research.live import Live
from research.live_scorer import LiveScorer
from research.live_writer import write
from research.stopping import CutShort

if TYPE_CHECKING:
    from research.config import Experiment
    from research.train import Run

VALIDATION, EVALUATION, SAMPLES = "validation", "evaluation", "samples"


def intervals(experiment: "Experiment") -> dict[str, int]:
    """Steps between two of each; 0: at the end only. What is never done has no entry."""
    found = {VALIDATION: experiment.schedule.validate_every}
    found |= {EVALUATION: experiment.evaluate.every} if experiment.evaluate.every else {}
    return found | ({SAMPLES: experiment.sample.every} if experiment.sample.every else {})


def due(run: "Run") -> list[str]:
    """What the step just taken calls for. After the last one all of it; but not the sample that the end of a run writes anyway."""
    experiment = run.job.experiment
    last = run.step == experiment.schedule.steps
    found = [what for what, every in intervals(experiment).items() if last or (every and run.step % every == 0)]
    return [what for what in found if not (last and what == SAMPLES and not experiment.sample.prompts)]


def carry_out(run: "Run", wanted: Iterable[str]) -> None:
    """Each in turn; `run.due` is what a signal has left. Its time is not training time. Collective."""
    run.due = [what for what in wanted if what in intervals(run.job.experiment)]
    while run.due:
        try:
            with run.meter.paused(run.due[0]):
                DO[run.due[0]](run)
        except CutShort:
            return
        del run.due[0]


def validate(run: "Run") -> None:
    """All of the held-out text."""
    model = run.job.experiment.model
    found = validation.validate(run.engine, run.corpus.validation, model.seq_length, model.drops, lambda: goes_on(run, VALIDATION))
    if found is None:
        raise CutShort
    is_best = run.best is None or found.bits_per_byte < run.best[0]
    if is_best:
        run.best = (found.bits_per_byte, run.step)
    row = found.row() | run.progress()
    run.tracker.log(row)
    run.voice.validation(row, is_best)


def evaluate(run: "Run") -> None:
    """One row with the metrics of all tasks."""
    scorer = LiveScorer(live(run, EVALUATION))
    found = [(sat, exams.sit(sat, scorer)) for sat in run.exams]
    row = run.progress()
    for sat, figures in found:
        row |= exams.row(sat, figures)
    run.tracker.log(row)
    run.voice.evaluation(row, [(sat.task.name, figures[0].name, figures[0].value) for sat, figures in found])


def sample(run: "Run") -> None:
    """A row a prompt, all or none. Logits that are not finite are said, and end nothing but the sample."""
    asked = run.job.experiment.sample
    choice = samples.choice_of(run.job.experiment)
    try:
        texts = write(live(run, SAMPLES), run.corpus.tokenizer, run.prompts, asked.tokens, choice, asked.seed)
    except Mistake as mistake:  # the same on every rank: all see the same logits
        run.voice.warn(f"no sample after step {run.step}: {mistake}")
        return
    rows = [samples.row(run.progress(), text.prompt, text.text, text.finish) for text in texts]
    run.tracker.samples(rows)
    for row in rows:
        run.voice.sample(row["prompt"], row["text"])


def live(run: "Run", what: str) -> Live:
    """The engine as it is now, for as long as nobody asks to stop."""
    return Live(run.engine, run.job.experiment.model, lambda: goes_on(run, what))


def goes_on(run: "Run", what: str) -> bool:
    """Between two batches: whether no rank was asked to stop. Collective."""
    run.doing.advance(what)
    return not run.stop.agreed()


DO: dict[str, Callable[["Run"], None]] = {VALIDATION: validate, EVALUATION: evaluate, SAMPLES: sample}
"""In the order in which they are carried out."""
