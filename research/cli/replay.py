"""`python -m research replay RUN --step N`: runs a step again in one process and shows where it first is not finite."""

from typing import TYPE_CHECKING, Any

from research.cli.json_output import add_json_option, only_json_on_stdout, print_json
from research.cli.trained_run import add_trust_option, find_run, settings_of_run
from research.cli.verbs import Parser
from research.cluster.environment import choose_accelerator
from research.config import Experiment
from research.config.experiment_folder import load_variants
from research.config.layout import batch_sizes
from research.data.prepare import Corpus
from research.tracking.console import Console
from research.tracking.format import one_line
from research.tracking.run_folder import RunFolder

if TYPE_CHECKING:  # it imports torch
    from research.training.replay import Examined, FirstNonFinite

WHAT = """Runs one step of a run again in one process: from the checkpoint before it, first the steps in between, then the step itself, one
micro-batch at a time, and checks the output and the gradient of every layer. Names the first module and the first logical parameter that is
not finite, the sample, and its text. If everything is finite here, the cause was not the data or the weights but a rank or its machine."""


def main(argv: list[str]) -> None:
    """Runs the step again and prints what is not finite."""
    parser = Parser("replay", WHAT)
    parser.add_argument("run", help="a run's folder (runs/gpt_sotu/latest), its name or its title")
    parser.add_argument("--step", type=int, required=True, help="the step, counted from 1 as in the rows and in incidents/")
    add_trust_option(parser)
    add_json_option(parser, "what was found")
    arguments = parser.parse_args(argv)
    folder = find_run(arguments.run)
    experiment, console = settings_of_run(arguments, folder, ["train", "validation"], trains=True), Console()
    choose_accelerator()  # before DeepSpeed is imported, with the next line; torch begins here
    from research.training.replay import replay

    with only_json_on_stdout(arguments.json):
        corpus, examined = replay(folder, experiment, arguments.step, console)
        show(console, folder, experiment, corpus, arguments.step, examined)
    if arguments.json:
        print_json(as_json(experiment, arguments.step, examined))


def as_json(experiment: Experiment, step: int, examined: "Examined") -> dict[str, Any]:
    """The step, its loss and gradient norm, and each culprit with the numbers of its samples."""
    culprits = [
        {
            **{"phase": culprit.phase, "name": culprit.name, "what": culprit.what, "micro_batch": culprit.micro_batch},
            "samples": _samples(culprit, experiment, step),
        }
        for culprit in examined.culprits
    ]
    return {"step": step, "loss": examined.loss, "grad_norm": examined.grad_norm, "culprits": culprits}


def show(console: Console, folder: RunFolder, experiment: Experiment, corpus: Corpus, step: int, examined: "Examined") -> None:
    """Prints each culprit with its samples, the texts of the first culprit, and the loss and gradient norm of the step."""
    from research.training import anomalies
    from research.training.replay import batches

    sizes = batch_sizes(experiment.schedule)
    console.header([("samples", f"{sizes.before(step - 1)}–{sizes.before(step) - 1}")])
    for culprit in examined.culprits:
        samples = ", ".join(str(number) for number in _samples(culprit, experiment, step)[:4])
        where = f" · sample {samples}" if samples and culprit.phase != "weights" else ""
        console.header([(culprit.phase, f"{culprit.name}: {culprit.what} not finite{where}")])

    # The beginnings of the first two samples in which the first culprit occurs.
    for culprit in examined.culprits[:1]:
        batch = batches(experiment, corpus, load_variants(folder.source, experiment), step)[culprit.micro_batch]
        for number, row in zip(_samples(culprit, experiment, step)[:2], culprit.rows[:2], strict=True):
            console.header([("text", f"sample {number}: {one_line(corpus.tokenizer.decode(batch.ids[row].tolist()))[:160]}")])

    console.header([("step", f"loss {examined.loss:.6g} · gradient norm {examined.grad_norm:.6g}")])
    if not examined.culprits:
        known = anomalies.path_of(folder, step).is_file()
        who = f": {anomalies.load(folder, step).said}" if known else ""
        console.header([("finite", f"in one process; what happened lay in a rank or its machine, not in the data or the weights{who}")])


def _samples(culprit: "FirstNonFinite", experiment: Experiment, step: int) -> list[int]:
    """The numbers of the samples in which the culprit is not finite."""
    first = batch_sizes(experiment.schedule).before(step - 1) + culprit.micro_batch * experiment.schedule.micro_batch_size
    return [first + row for row in culprit.rows]
