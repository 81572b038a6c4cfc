"""`python -m research fork A B --set model.norm=rmsnorm`: copies an experiment's folder and changes settings in the copy."""

from pathlib import Path

from research.ablation import fork as forks
from research.ablation.lineage import folder_of
from research.cli.verbs import Parser
from research.config.experiment_folder import LAUNCHER
from research.tracking.console import Console
from research.tracking.format import short_path

WHAT = """Copies the folder of an experiment and changes settings in the copy's config.py: comments and formatting stay as they are, and
`diff -r` of the two folders shows what was asked for and no more. `parent` and `changes` say what the copy is, so that `check` finds any
other difference. The copy is loaded before it appears: what does not load, or does not divide at its own layout, is refused."""


def main(argv: list[str]) -> None:
    """Makes the folder and says what it changes."""
    parser = Parser("fork", WHAT)
    parser.add_argument("parent", metavar="A", help="the experiment to copy: experiments/NAME, or NAME")
    parser.add_argument("target", metavar="B", help="the folder to make: experiments/NEW, or NEW beside A")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the copy, as on the command line of a launch; may be given several times, also for one setting of several texts",
    )
    parser.add_argument("--question", help="the question that the copy answers (default: that of A)")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="PATH",
        help="train on this file or folder of text, or on a corpus that `prepare` has made: corpora/NAME",
    )
    arguments = parser.parse_args(argv)
    source = folder_of(arguments.parent).resolve()
    target = Path(arguments.target)
    made = forks.fork(
        source,
        target if len(target.parts) != 1 else source.parent / target,
        arguments.settings,
        arguments.question,
        arguments.text,
    )
    console, place = Console(), short_path(made.folder)
    console.header([("", f"{place} · a fork of {made.parent}"), *forks.describe(made)])
    console.next([f"python {place}/{LAUNCHER} --dry-run", f"python -m research diff {short_path(source)} {place}"])
