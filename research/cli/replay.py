"""`python -m research replay RUN --step N`: runs a step again in one process, to see where it first is not finite."""

from research.cli.verbs import Parser
from research.config import Experiment, serialization
from research.data.prepare import Corpus
from research.tracking import run_folder
from research.tracking.console import Console
from research.tracking.format import one_line
from research.tracking.run_folder import RunFolder
from research.training import anomalies
from research.training.replay import Examined, FirstNonFinite, batches, replay

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
    experiment, console = serialization.load(folder.config), Console()
    corpus, found = replay(folder, experiment, arguments.step, console)
    show(console, folder, experiment, corpus, arguments.step, found)


def show(console: Console, folder: RunFolder, experiment: Experiment, corpus: Corpus, step: int, found: Examined) -> None:
    """What was found, as a person reads it."""
    console.header([("samples", f"{(step - 1) * experiment.schedule.batch_size}–{step * experiment.schedule.batch_size - 1}")])
    for culprit in found.culprits:
        console.header([(culprit.phase, f"{culprit.name}: {culprit.what} not finite{_where(culprit, experiment, step)}")])
    for culprit in found.culprits[:1]:
        console.header([("text", text) for text in _texts(culprit, experiment, corpus, step)])
    console.header([("step", f"loss {found.loss:.6g} · gradient norm {found.grad_norm:.6g}")])
    if not found.culprits:
        known = anomalies.path_of(folder, step).is_file()
        who = f": {anomalies.load(folder, step).said}" if known else ""
        console.header([("finite", f"in one process; what happened lay in a rank or its machine, not in the data or the weights{who}")])


def _where(culprit: FirstNonFinite, experiment: Experiment, step: int) -> str:
    if culprit.phase == "weights" or not culprit.rows:
        return ""
    return f" · sample {', '.join(str(number) for number in _samples(culprit, experiment, step)[:4])}"


def _samples(culprit: FirstNonFinite, experiment: Experiment, step: int) -> list[int]:
    schedule = experiment.schedule
    first = (step - 1) * schedule.batch_size + culprit.micro_batch * schedule.micro_batch_size
    return [first + row for row in culprit.rows]


def _texts(culprit: FirstNonFinite, experiment: Experiment, corpus: Corpus, step: int) -> list[str]:
    """The beginnings of the first two samples concerned."""
    batch = batches(experiment, corpus, step)[culprit.micro_batch]
    numbers = _samples(culprit, experiment, step)
    pairs = zip(numbers[:2], culprit.rows[:2], strict=True)
    return [f"sample {number}: {one_line(corpus.tokenizer.decode(batch.ids[row].tolist()))[:160]}" for number, row in pairs]
