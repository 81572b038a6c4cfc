"""`python -m research replay RUN --step N`: a step again, in one process, to see where it first is not finite."""

from pathlib import Path
from typing import Any

import torch

from models import gpt
from parallel import checkpoint, checkpoint_folder, distributed
from parallel.engine import PRECISIONS, Engine, MicroBatch, make_engine
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import PlainModule, unique_parameters
from research import config, incidents, initial, run_folder
from research.config import Experiment
from research.data import prepare
from research.data.batches import train_micro_batches
from research.data.prepare import Corpus
from research.examine import Culprit, Examined, examine
from research.experiment import load_variants
from research.layout import engine_settings, layout
from research.machine import choose_accelerator
from research.report import Report
from research.run_folder import RunFolder
from research.schedule import learning_rate
from research.tensors import micro_batch
from research.text import one_line
from research.verbs import Parser

ROOT = Path(__file__).resolve().parent.parent
WHAT = """Runs one step of a run again in one process: from the checkpoint before it, the steps in between first, then micro-batch by
micro-batch, every layer's output and gradient looked at. Names the first module and the first logical parameter that is not finite, the
sample, and its text. Where all is finite here, the fault was no matter of data and weights: it lay in a rank, or in its machine."""


def main(argv: list[str]) -> None:
    """Prints what was found."""
    parser = Parser("replay", WHAT)
    parser.add_argument("run", help="a run's folder (runs/gpt_sotu/latest), its name or its title")
    parser.add_argument("--step", type=int, required=True, help="the step, counted from 1 as in the rows and in incidents/")
    arguments = parser.parse_args(argv)
    folder = run_folder.find(arguments.run)
    replay(folder, config.load(folder.config), arguments.step)


def replay(folder: RunFolder, experiment: Experiment, step: int) -> Examined:
    """Step `step` (from 1) of the run, examined and reported."""
    if step < 1:
        raise Mistake(f"--step {step} is not a step → count from 1, as the rows of metrics.jsonl do")
    report = Report()
    base, first = start_of(folder, step)
    again = f"{step - 1 - first} steps trained again" if first < step - 1 else "no step in between"
    report.header([("", f"replay {folder.title} · step {step} · from {base.name if base else 'the initial weights'}, {again}")])
    corpus = prepare.load(experiment.data, ROOT, experiment.model.vocab_size)
    module, scale = reached(folder, experiment, corpus, base, first, step, report)
    loss = gpt.TokenLoss(experiment.model.vocab_size, experiment.optimizer.label_smoothing, None)
    found = examine(module, loss, batches(experiment, corpus, step), scale)
    tell(report, folder, experiment, corpus, step, found)
    return found


def start_of(folder: RunFolder, step: int) -> tuple[Path | None, int]:
    """(checkpoint or None, the steps it has taken): the nearest that holds the weights from before the step.

    A step that was not applied left its weights as they were, so that the checkpoint made right after it will do.
    """
    complete = {int(path.name.removeprefix("step_")): path for path in checkpoint_folder.steps(folder.checkpoints)}
    skipped = incidents.path_of(folder, step).is_file() and incidents.load(folder, step).kind == incidents.NON_FINITE
    if skipped and step in complete:
        return complete[step], step - 1
    before = [taken for taken in complete if taken < step]
    return (complete[max(before)], max(before)) if before else (None, 0)


def reached(
    folder: RunFolder, experiment: Experiment, corpus: Corpus, base: Path | None, first: int, step: int, report: Report
) -> tuple[PlainModule, float]:
    """A plain module with the weights from before the step, in the run's precision, and the loss scale. Trains what lies in between."""
    choose_accelerator()
    distributed.start(0, 1, 0, None)
    try:
        alone = experiment.model_copy(update={"parallel": config.Parallel()})
        engine = _engine(folder, alone)
        if base is not None:
            checkpoint.load(base, engine)
        elif path := initial.path_of(experiment, ROOT):
            checkpoint.load_initial(path, engine)
        with report.progress("steps in between", step - 1 - first) as advance:
            for taken in range(first, step - 1):
                lr = learning_rate(taken, experiment.optimizer, experiment.schedule.steps)
                engine.train_batch(batches(experiment, corpus, taken + 1), lr)
                advance()
        return _plain(folder, experiment, engine), float(getattr(engine.optimizer, "loss_scale", None) or 1.0)
    finally:
        distributed.stop()


def _layers(folder: RunFolder, experiment: Experiment) -> list[Any]:
    return gpt.layers(experiment.model, Grid(), experiment.seed, load_variants(folder.source, experiment.model))


def _engine(folder: RunFolder, experiment: Experiment) -> Engine:
    loss = gpt.TokenLoss(experiment.model.vocab_size, experiment.optimizer.label_smoothing, None)
    return make_engine(_layers(folder, experiment), loss, Grid(), engine_settings(experiment, layout(experiment, 1)))


def _plain(folder: RunFolder, experiment: Experiment, engine: Engine) -> PlainModule:
    module = PlainModule(_layers(folder, experiment))
    weights = dict(engine.full_weights())
    with torch.no_grad():
        for name, parameter in unique_parameters(module):
            parameter.copy_(weights[name])
    return module.to(PRECISIONS[experiment.precision])


def batches(experiment: Experiment, corpus: Corpus, step: int) -> list[MicroBatch]:
    """All micro-batches of a step (from 1), as one data rank would take them."""
    schedule, model = experiment.schedule, experiment.model
    found = train_micro_batches(
        corpus.train, model.seq_length, schedule.batch_size, schedule.micro_batch_size, 0, 1, experiment.seed, step - 1
    )
    return [micro_batch(batch, model.drops) for batch in found]


def tell(report: Report, folder: RunFolder, experiment: Experiment, corpus: Corpus, step: int, found: Examined) -> None:
    """What was found, as a person reads it."""
    report.header([("samples", f"{(step - 1) * experiment.schedule.batch_size}–{step * experiment.schedule.batch_size - 1}")])
    for culprit in found.culprits:
        report.header([(culprit.phase, f"{culprit.name}: {culprit.what} not finite{_where(culprit, experiment, step)}")])
    for culprit in found.culprits[:1]:
        report.header([("text", text) for text in _texts(culprit, experiment, corpus, step)])
    report.header([("step", f"loss {found.loss:.6g} · gradient norm {found.grad_norm:.6g}")])
    if not found.culprits:
        known = incidents.path_of(folder, step).is_file()
        who = f": {incidents.load(folder, step).said}" if known else ""
        report.header([("finite", f"in one process; what happened lay in a rank or its machine, not in the data or the weights{who}")])


def _where(culprit: Culprit, experiment: Experiment, step: int) -> str:
    if culprit.phase == "weights" or not culprit.rows:
        return ""
    return f" · sample {', '.join(str(number) for number in _samples(culprit, experiment, step)[:4])}"


def _samples(culprit: Culprit, experiment: Experiment, step: int) -> list[int]:
    schedule = experiment.schedule
    first = (step - 1) * schedule.batch_size + culprit.micro_batch * schedule.micro_batch_size
    return [first + row for row in culprit.rows]


def _texts(culprit: Culprit, experiment: Experiment, corpus: Corpus, step: int) -> list[str]:
    """The beginnings of the first two samples concerned."""
    batch = batches(experiment, corpus, step)[culprit.micro_batch]
    numbers = _samples(culprit, experiment, step)
    pairs = zip(numbers[:2], culprit.rows[:2], strict=True)
    return [f"sample {number}: {one_line(corpus.tokenizer.decode(batch.ids[row].tolist()))[:160]}" for number, row in pairs]
