"""`python -m research evaluate RUN --tasks …`: evaluates a trained model on tasks and keeps the results in the run's folder.

Parses the command line and checks it before torch is imported. Output: a table of metrics with their standard errors, tab-separated
lines in a pipe, or JSON lines.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from models.config import GPT
from models.encoder_config import T5
from parallel.errors import Mistake
from parallel.files import user_path
from research import ROOT
from research.cli.json_output import print_json
from research.cli.trained_run import Trained, add_trust_option, find, refuse_launcher, say
from research.cli.verbs import Parser
from research.config import Pairs
from research.config.abilities import writer_of
from research.data.run_tokenizer import load_tokenizer
from research.data.text_stores import cache_folder
from research.evaluation import human_eval, lm_eval_task, perplexity, registry, translation
from research.evaluation.human_eval import HumanEval, Sampling
from research.evaluation.limited_program import PATIENCE, Limits
from research.evaluation.lm_eval_task import LMEvalTask
from research.evaluation.results import Key, Result, Results, code_digest, model_digest, with_digests
from research.evaluation.task import Settings, Task, TaskContext, TextTask, evaluate
from research.evaluation.translation import Translation
from research.generation.infilling import trained_sentinels
from research.generation.sources import source_form
from research.tracking import format as fmt
from research.tracking import run_folder
from research.tracking.console import Console, TerminalConsole
from research.tracking.own_runs import is_own

WHAT = """Evaluates a trained model on tasks and keeps the results in RUN/evaluations/step_N.json. A task that was evaluated before, on the
same checkpoint, data and settings, is not run again. The metrics are the same on any number of tensor ranks, up to rounding.
docs/evaluating.md defines them."""
LISTS = ("list", "help")
TOKENS_AT_ONCE = 8192
"""How many tokens are scored at once without --batch."""
COLUMNS = ("task", "metric", "value", "± stderr", "examples", "precision", "time")
RIGHT_ALIGNED = ("value", "± stderr", "examples", "time")
LONGEST_CELL = 400
"""The most characters of a cell: names of tasks and metrics come from files."""

UNSHOWN = (lm_eval_task.PACKAGE, human_eval.INTERPRETER, translation.PACKAGE)
"""Settings of tasks that are versions of software."""

AnyTask = Task | TextTask | LMEvalTask | HumanEval | Translation


def main(argv: list[str]) -> None:
    """Prints the table. After Ctrl-C or a mistake, the tasks that were finished are kept and shown, and are not run again."""
    arguments = parser().parse_args(argv)
    if any(name in LISTS for name in task_names(arguments)):
        show_tasks()
        return
    command = prepared(arguments)
    results = Results(command.folder, command.checkpoint)

    # the tasks whose results are not known yet
    data = command.experiment.data
    tokenizer = load_tokenizer(data, ROOT, say)
    sentinels, examples = trained_sentinels(command.experiment, tokenizer), data.examples
    separator = examples.separator if isinstance(examples, Pairs) else None
    context = TaskContext(tokenizer, command.experiment.model.seq_length + 1, data, ROOT, say, sentinels, separator)
    precision = _precision(command)
    determined_by = (tokenizer.fingerprint, model_digest(command.folder, command.model), code_digest(), precision)
    keys = {task: Key(task.name, task.settings, task.digest(context), *determined_by) for task in command.tasks}
    new = {task: key for task, key in keys.items() if arguments.again or not results.known(key)}

    console = Console(sys.stderr)  # everything but the metrics goes there
    known = [task.name for task in keys if task not in new]
    skipped = f" · known already: {', '.join(known)} (--again)" if known else ""
    console.header([("", f"evaluate {command.folder.title} · {command.checkpoint.name}{skipped}")])
    evaluated: list[AnyTask] = []
    try:
        if new:
            _evaluate(command, context, new, results, evaluated)
    finally:
        show([result for key in keys.values() if (result := results.of(key))], arguments.json)
        if (path := results.path).is_file():
            console.header([("kept", str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))])
        if evaluated and (arguments.trust or is_own(command.folder)):  # another's run names a project that is another's
            from research.tracking import wandb_summary

            if line := wandb_summary.add(command.folder, summary_rows(results.results)):
                console.header([("tracking", line)])


# The command line, and the checks before torch is imported


@dataclass(frozen=True)
class Command(Trained):
    """A checked command."""

    model: GPT | T5
    tasks: tuple[AnyTask, ...]
    batch: int
    """How many windows of full length are scored at once."""


def parser() -> Parser:
    """The options of `evaluate`."""
    parser = Parser("evaluate", WHAT)
    parser.add_argument("run", nargs="?", help="a run's folder (runs/gpt_sotu/latest), its name or its title")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[registry.VALIDATION],
        metavar="TASK",
        help="names of tasks, separated by spaces or commas; list: shows them all",
    )
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="the checkpoint of this step (default: the newest)")
    add_trust_option(parser)
    parser.add_argument("--again", action="store_true", help="run tasks again that were evaluated before")
    data = parser.add_argument_group("data and examples")
    data.add_argument("--data", type=Path, metavar="FOLDER", help="a folder with wikitext2/test.txt and lambada/test.jsonl")
    data.add_argument("--limit", type=int, metavar="N", help="the first N examples (passages, pairs, questions, windows) of each task")
    data.add_argument("--window", type=int, metavar="W", help="tokens of a window of running text (default: model.seq_length + 1)")
    data.add_argument("--stride", type=int, metavar="S", help="tokens of a window that are scored (default: W − 1, nothing is read twice)")
    data.add_argument("--lm_eval_tasks", type=Path, metavar="FOLDER", help="YAML files for lm_eval:NAME, beside the harness' own")
    data.add_argument(
        "--fewshot", type=int, metavar="K", help="solved examples before each question of lm_eval: tasks (default: the task's)"
    )
    code = parser.add_argument_group(human_eval.NAME)
    add = code.add_argument
    add("--execute", action="store_true", help="execute the programs that the model writes; needed for humaneval")
    add("--samples", type=int, metavar="N", help="completions of each problem (default: 1)")
    add("--k", type=int, nargs="+", metavar="K", help="estimate pass@K; K at most N (default: those of 1, 10 and 100)")
    add("--temperature", type=float, metavar="T", help="0: take the likeliest token (default); 1: draw by the model's probabilities")
    add("--top_p", type=float, metavar="P", help="draw from the likeliest tokens that have probability P together (default: 1)")
    add("--max_new_tokens", type=int, metavar="N", help=f"tokens of a completion (default: {human_eval.DEFAULT_TOKENS})")
    add("--seed", type=int, help="seed of the draws (default: 0)")
    timeout = f"CPU seconds of a completion and its tests (default: {Limits().cpu_seconds}); by the clock {PATIENCE} times as many"
    add("--timeout", type=int, metavar="S", help=timeout)
    beams = "beams of the search for a translation (default: 1, always the likeliest token)"
    parser.add_argument_group(translation.NAME).add_argument("--beams", type=int, metavar="N", help=beams)
    machine = parser.add_argument_group("how it is computed")
    machine.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: as trained (fp16 on a CPU: fp32)")
    machine.add_argument("--tensor", type=int, default=1, metavar="T", help="slice the model over T processes of this machine")
    default = f"what makes {TOKENS_AT_ONCE:,} tokens"
    machine.add_argument(
        "--batch", type=int, metavar="N", help=f"full windows at once, or as many tokens of shorter texts (default: {default})"
    )
    machine.add_argument("--json", action="store_true", help="the results as JSON lines instead of a table")
    return parser


def task_names(arguments: argparse.Namespace) -> list[str]:
    """The names in --tasks. A comma separates two names unless it is part of an existing file's name."""
    names: list[str] = []
    for word in arguments.tasks:
        is_file = Path(word.partition(":")[2]).is_file()
        names += [word] if is_file else word.split(",")
    return list(filter(None, names))


def prepared(arguments: argparse.Namespace) -> Command:
    """The command, checked without torch."""
    refuse_launcher("evaluate")
    if arguments.run is None:
        raise Mistake("evaluate needs a run → name one: python -m research evaluate runs/gpt_sotu/latest")
    for name in ("limit", "batch", "tensor"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise Mistake(f"--{name} {value} does not work → use 1 or more")
    if arguments.fewshot is not None and arguments.fewshot < 0:
        raise Mistake(f"--fewshot {arguments.fewshot} does not work → use 0 or more")

    trained = find(arguments, ["validation"] if registry.VALIDATION in task_names(arguments) else [])
    model = writer_of("evaluate", trained.experiment.model, trained.folder.title)
    refuse_unsuited(model, task_names(arguments), trained.folder.title)
    seq_length = model.seq_length
    settings = Settings(arguments.limit, arguments.window, arguments.stride, arguments.data)
    perplexity.window_sizes(settings, seq_length + 1)
    tasks: list[AnyTask] = []
    for name in dict.fromkeys(task_names(arguments)):
        if name.startswith(lm_eval_task.PREFIX):
            tasks.append(lm_eval_task.create_task(name, settings, arguments.lm_eval_tasks, arguments.fewshot))
        elif human_eval.is_name(name):
            values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Sampling)}
            sampling = Sampling(**values | {"k": arguments.k and tuple(arguments.k)})
            tasks.append(human_eval.create_task(name, settings, sampling, arguments.execute))
        elif translation.is_name(name):
            tasks.append(translation.create_task(name, settings, arguments.beams, trained.experiment))
        else:
            tasks += registry.create_tasks([name], settings, others=(*human_eval.TASKS, translation.NAME))
    if any(isinstance(task, LMEvalTask) for task in tasks):
        lm_eval_task.keep_offline(user_path(ROOT, trained.experiment.data.cache) / "lm_eval")
    batch = max(1, TOKENS_AT_ONCE // seq_length) if arguments.batch is None else arguments.batch
    return Command(**vars(trained), model=model, tasks=tuple(tasks), batch=batch)


def refuse_unsuited(model: GPT | T5, names: Sequence[str], title: str) -> None:
    """Raises a Mistake if a task scores texts that a decoder-only model continues, and the model has an encoder."""
    others = [name for name in names if not translation.is_name(name)]
    if isinstance(model, T5) and others:
        raise Mistake(f"{others[0]} is for models that continue texts, and {title} is a T5 → use --tasks {translation.NAME}")


# Evaluation


def _precision(command: Command) -> str:
    """The precision that the model will compute in. Imports torch."""
    from parallel.distributed import PRECISIONS, device
    from research.generation.restore import dtype_of

    dtype = dtype_of(command.arguments.precision, command.experiment.precision, device())
    return next(name for name, known in PRECISIONS.items() if known == dtype)


def _evaluate(command: Command, context: TaskContext, keys: Mapping[AnyTask, Key], results: Results, evaluated: list[AnyTask]) -> None:
    """Evaluates the tasks one after the other; adds each to `results` and `evaluated` as soon as it is finished."""
    from research.evaluation.session import Session

    arguments, experiment, console, opened = command.arguments, command.experiment, Console(sys.stderr), set[Path]()
    source = source_form(experiment, context.tokenizer)
    machine = (arguments.precision, arguments.tensor, command.batch, console.warn, source)
    with Session(command.folder.path, command.checkpoint, command.model, context.tokenizer, *machine) as session:
        for task, key in keys.items():
            began = time.monotonic()
            if isinstance(task, LMEvalTask):
                with console.progress(task.name) as advance, cache_folder(experiment.data.cache, ROOT) as cache:
                    metrics, examples, files = task.evaluate(session, cache / "lm_eval", advance)
                opened |= files  # what a helper read for an earlier task, it may have kept for this one
            elif isinstance(task, TextTask):
                texts = task.texts(context)
                with console.progress(task.name, len(texts.requests)) as advance:
                    metrics, examples = texts.metrics(session.texts(texts.requests, advance)), texts.examples
            elif isinstance(task, HumanEval):
                metrics, examples = task.evaluate(session, console.progress, lambda text: console.header([("limits", text)]), console.warn)
            elif isinstance(task, Translation):
                console.header([("metrics", f"{translation.PACKAGE} · {' · '.join(translation.signatures())}")])
                metrics, examples = task.evaluate(session, context, console.progress)
            else:
                requests = task.requests(context)
                with console.progress(task.name, len(requests.requests)) as advance:
                    metrics, examples = evaluate(requests, session.scorer, advance), requests.examples
            seconds = round(time.monotonic() - began, 1)
            read = with_digests(opened if isinstance(task, LMEvalTask) else ())
            results.add(Result(key, tuple(metrics), examples, seconds, arguments.tensor, command.batch, run_folder.now(), read))
            evaluated.append(task)


# Output


def show_tasks() -> None:
    """Prints every task and its description."""
    rows = [
        *registry.descriptions(),
        (human_eval.NAME, "HumanEval, pass@k: executes what the model writes (--execute); humaneval:FILE for problems of yours"),
        (translation.NAME, "BLEU and chrF of translations, of LibreOffice's help; translation:FILE.jsonl for pairs of yours"),
        ("humaneval_chat", "the same, asked for in a conversation, with the run's chat template"),
        (f"{lm_eval_task.PREFIX}NAME", "a task of lm-evaluation-harness (requirements-eval.txt), --lm_eval_tasks FOLDER"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {description}" for name, description in rows))


def show(results: Sequence[Result], as_json: bool) -> None:
    """Prints the metrics: as JSON lines, as a table in a terminal, or tab-separated in a pipe."""
    rows = [row for result in results for row in table_rows(result)]
    if as_json:
        for result in results:
            print_json(result.row())
    elif sys.stdout.isatty():
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for column in COLUMNS:
            no_wrap = column not in ("task", "metric")
            table.add_column(column, justify="right" if column in RIGHT_ALIGNED else "left", no_wrap=no_wrap)
        for row in rows:
            table.add_row(*(Text(fmt.one_line(cell, LONGEST_CELL)) for cell in row))
        TerminalConsole().print(table)
    else:
        print("\n".join("\t".join(fmt.one_line(cell, LONGEST_CELL) for cell in row) for row in [COLUMNS, *rows]))


def table_rows(result: Result) -> list[tuple[str, ...]]:
    """One row per metric; only the first has the columns that all metrics of the task share."""
    shared = (f"{result.examples:,}", result.key.precision, fmt.duration(result.seconds))
    rows: list[tuple[str, ...]] = []
    for i, metric in enumerate(result.metrics):
        is_count = human_eval.is_name(result.key.task) and metric.name in human_eval.COUNTS
        value = f"{metric.value:,.0f}" if is_count else format_value(metric.value)
        numbers = (metric.name, value, format_value(metric.stderr))
        rows.append((label(result), *numbers, *shared) if i == 0 else ("", *numbers, "", "", ""))
    return rows


def label(result: Result) -> str:
    """The task and the settings that differ from its definition's: lambada (limit 100)."""
    settings = [f"{name} {value}" for name, value in result.key.settings.items() if value is not None and name not in UNSHOWN]
    return result.key.task + (f" ({', '.join(settings)})" if settings else "")


def format_value(value: float | None) -> str:
    """Four decimals, one from a thousand on; '' for None."""
    if value is None or fmt.missing(value):
        return "" if value is None else fmt.missing(value)
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"


def summary_rows(results: Sequence[Result]) -> dict[str, float]:
    """{'eval/lambada/accuracy': 0.45, …}, without the folder of a task's file."""
    rows: dict[str, float] = {}
    for result in results:
        kind, _, file = label(result).partition(":")
        name = f"{kind}:{file.rpartition('/')[2]}" if file else kind
        rows.update({f"eval/{name}/{metric.name}": metric.value for metric in result.metrics})
    return rows
