"""`python -m research compare A B …`: whether runs of several experiments differ by more than noise. Imports torch for --windows only."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from pathlib import Path

from parallel.errors import Mistake
from parallel.files import published
from research.ablation import figures, report
from research.ablation.comparison import AXES, BEST, FINAL, METRIC, Comparison, Question, compare
from research.ablation.equal_size import SIZES, proposal
from research.ablation.sides import find_sides
from research.cli.compare_evaluations import with_evaluations
from research.cli.compare_windows import with_text_noise
from research.cli.json_output import add_json_option, only_json_on_stdout, print_json
from research.cli.trained_run import add_trust_option
from research.cli.verbs import Parser
from research.config.diff import describe_changes
from research.tracking import plot
from research.tracking.console import Console, show_tables
from research.tracking.format import short_path
from research.tracking.metrics import finite
from research.tracking.plot import DARK, LIGHT

WHAT = """Compares the finished runs of experiments, seed by seed, with those of the first one. Says for each whether it is better, worse or
not distinguishable at this budget, and writes a report, tables and pictures. A side is an experiment's name or folder, the folder of its
runs, or runs one by one with commas between them; gpt_sotu:optimizer.lr=0.001 keeps the runs with this setting. docs/comparing.md says
how it is decided."""


def main(argv: list[str]) -> None:
    """Prints the table and the verdicts, and writes the files."""
    parser = Parser("compare", WHAT)
    parser.add_argument("sides", nargs="+", metavar="SIDE", help="the baseline, and one variant or more")
    parser.add_argument("--metric", default=METRIC, help=f"a key of metrics.jsonl, or eval/TASK/METRIC after evaluate (default: {METRIC})")
    parser.add_argument("--at", choices=tuple(AXES), default="tokens", help="what the runs have spent equally (default: tokens)")
    parser.add_argument("--value", choices=(FINAL, BEST), default=FINAL, help="the value that is tested (default: final)")
    parser.add_argument("--better", choices=("lower", "higher"), help="which values of the metric are better, if its name does not say so")
    parser.add_argument("--smallest", type=_positive, metavar="D", help="propose seeds for an effect of D (default: for the observed one)")
    parser.add_argument("--iso", choices=tuple(SIZES), help="propose a size of each variant that equals the baseline in this")
    parser.add_argument("--windows", action="store_true", help="score the held-out text with every run's checkpoint, for its own noise")
    add_trust_option(parser)
    parser.add_argument("--out", type=Path, default=Path("compare"), metavar="FOLDER", help="where the files go (default: compare)")
    modes = ("auto", "online", "offline")
    parser.add_argument(
        "--wandb", choices=modes, help="also write a W&B run of the job type compare: auto as track.mode does (default: none)"
    )
    add_json_option(parser, "the comparison")
    arguments = parser.parse_args(argv)
    question = Question(arguments.metric, arguments.at, arguments.value, arguments.better, arguments.smallest)

    comparison = compare(with_evaluations(find_sides(arguments.sides), arguments.metric), question)
    proposals = [proposal(comparison.baseline, variant.side, arguments.iso) for variant in comparison.variants if arguments.iso]
    if arguments.windows:
        comparison = with_text_noise(comparison, arguments)
    with only_json_on_stdout(arguments.json):
        show(comparison)
        Console().header([("iso", said) for said in proposals])
        write(comparison, arguments.out)
        if arguments.wandb:
            Console().header([("tracking", track(comparison, arguments.out, arguments.wandb))])
    if arguments.json:
        print_json(report.as_json(comparison) | {"iso": proposals})


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ArgumentTypeError(f"{text[:20]!r} is not a number above 0")
    return value


def show(comparison: Comparison) -> None:
    """What differs, the table, and the verdicts."""
    console = Console()
    console.header([("compare", report.heading(comparison))])
    for variant in comparison.variants:
        code = ["variant.py"] if variant.code else []
        changes = [describe_changes([change]) for change in variant.changes]
        console.header([("differs", f"{variant.side.label}: {', '.join(changes + code) or 'no setting that affects results'}")])
    for warning in report.warnings(comparison):
        console.warn(warning, in_header=True)
    show_tables([report.table(comparison)])
    console.header([("verdict", report.sentence(comparison, variant)) for variant in comparison.variants])


def write(comparison: Comparison, out: Path, kinds: Sequence[str] = ("png", "svg")) -> None:
    """The report, the tables and the pictures in these formats, each of which appears whole."""
    texts: dict[str, Callable[[Comparison], str]] = {
        "compare.md": report.markdown,
        "differences.csv": report.differences_csv,
        "runs.csv": report.runs_csv,
    }
    pictures = {report.CURVES: figures.curves, report.DIFFERENCES: figures.differences}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with published(out / name) as temporary:
                temporary.write_text(text(comparison), encoding="utf-8", errors="backslashreplace")
        for name, draw in pictures.items():
            for theme, colours in (("light", LIGHT), ("dark", DARK)):
                figure = draw(comparison, colours)
                for kind in kinds:
                    plot.save(figure, out / f"{name}_{theme}.{kind}")
    except OSError as error:
        raise Mistake(f"{out} cannot be written ({error.strerror}) → name a folder that you may write") from None
    endings = kinds[0] if len(kinds) == 1 else f"{{{','.join(kinds)}}}"
    written = [*texts, *(f"{name}_{{light,dark}}.{endings}" for name in pictures)]
    Console().header([("written", f"{short_path(out)}/ · {' · '.join(written)}")])


def track(comparison: Comparison, out: Path, mode: str) -> str:
    """Writes the W&B run, into the baseline's project, and returns a line on where it is."""
    from research.tracking import wandb_comparison

    shown = report.as_json(comparison)
    rows = shown["variants"]
    columns = [name for name in rows[0] if name not in ("changes", "differences")]
    summary = {f"{row['variant']}/{name}": row[name] for row in rows for name in ("difference", "adjusted_p", "verdict")}
    labels = [side.label for side in comparison.sides]
    pictures = {f"{name}_picture": out / f"{name}_light.png" for name in (report.CURVES, report.DIFFERENCES)}
    cells = [[row[column] for column in columns] for row in rows]
    table = columns, [[None if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in row] for row in cells]
    project = comparison.baseline.first.experiment.track.project
    return wandb_comparison.write(out, "-vs-".join(labels), project, {"compare": finite(shown)}, table, finite(summary), pictures, mode)
