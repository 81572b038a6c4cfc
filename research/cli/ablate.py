"""`python -m research ablate FORK…`: trains forks and their parents with the same seeds, and keeps the comparison in each fork's folder."""

import sys
from pathlib import Path

from parallel.errors import Mistake
from research import ROOT
from research.ablation import lineage, results, trials
from research.ablation.comparison import Question, compare
from research.ablation.lineage import Family, Member
from research.ablation.sides import Side, read_finished
from research.ablation.sweep import Sweep
from research.cli import sweep
from research.cli.compare import show, write
from research.cli.json_output import add_json_option, only_json_on_stdout, print_json
from research.cli.supervise import launcher_command
from research.cli.verbs import Parser, count
from research.config.experiment_folder import RESULTS, load
from research.tracking.console import Console

WHAT = """Trains each fork and its parent with the same seeds, compares them, and writes the report, the tables and the pictures into the
folder results/ of the fork, to be committed with it. Nothing is trained twice: runs that are there count, and the same command goes on
where it was stopped. Without a name, every fork that has results/ is done again. What the launches print is in runs/NAME/sweeps/ID/.
Settings that all runs share may follow after --, as for launch.py; the results then say so."""
EXAMPLE = """examples:
  python -m research ablate experiments/gpt_sotu_rotary --jobs 2
  python -m research ablate experiments/gpt_sotu_rotary experiments/gpt_sotu_swiglu --seeds 5
  python -m research ablate experiments/gpt_sotu_rotary --out /tmp/short -- --schedule.steps 100 --track.runs runs/short
  python -m research ablate --jobs 2"""
PICTURES = ("svg",)


def main(argv: list[str]) -> None:
    """Trains, compares and writes, fork by fork. Exits with 1 if a run has failed, and with 128 + n after signal n."""
    end = argv.index("--") if "--" in argv else len(argv)
    arguments = _parser().parse_args(argv[:end])
    settings = tuple(argv[end + 1 :])
    pairs = _pairs(arguments.forks)
    if arguments.out and len(pairs) > 1:
        raise Mistake(f"--out {arguments.out} is one folder, and there are {len(pairs)} forks → name one of them")
    launcher = launcher_command(arguments.launcher)
    command = [sys.executable] if arguments.launcher == sweep.PYTHON else launcher
    found = []
    with only_json_on_stdout(arguments.json):
        for parent, fork in pairs:
            sides = [_trained(member, arguments.seeds, settings, command, arguments.jobs) for member in (parent, fork)]
            comparison = compare(sides, Question())
            out = arguments.out or fork.folder / RESULTS
            show(comparison)
            write(comparison, out, PICTURES)
            results.save(out, parent, fork, comparison, settings)
            found.append(results.read_table(out))
    if arguments.json:
        print_json(found)


def _parser() -> Parser:
    parser = Parser("ablate", WHAT, EXAMPLE)
    parser.add_argument("forks", nargs="*", metavar="FORK", help="experiments that have a parent (default: those that have results/)")
    parser.add_argument(
        "--seeds", default="3", metavar="N|A,B", help="how many seeds, from each experiment's own on, or which (default: 3)"
    )
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="runs at the same time; they divide the cores (default: 1)")
    parser.add_argument("--launcher", default=sweep.PYTHON, metavar="COMMAND", help="what starts launch.py (default: python)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the result goes (default: FORK/results)")
    add_json_option(parser, "the results")
    return parser


def _pairs(handles: list[str]) -> list[tuple[Member, Member]]:
    """(parent, fork) of each fork. A Mistake if one has no parent, or does not differ from it in what it declares."""
    everything = Family()
    named = lineage.families_of(handles) or [(everything, name) for name in everything.names if (everything.root / name / RESULTS).is_dir()]
    if not named:
        raise Mistake(f"no experiment has a folder {RESULTS} → name a fork: python -m research ablate experiments/gpt_sotu_rotary")
    pairs = []
    for family, name in named:
        fork = family.member(name)
        if wrong := lineage.problems(fork, family):
            raise Mistake(wrong[0])
        if fork.experiment is None or fork.experiment.parent is None:
            raise Mistake(f"{name} has no parent with which it could be compared → name a fork: python -m research fork {name} NAME")
        pairs.append((family.member(fork.experiment.parent), fork))
    return pairs


def _trained(member: Member, seeds: str, settings: tuple[str, ...], launcher: list[str], jobs: int) -> Side:
    """The runs of an experiment, one for each seed, after those that are missing have been trained."""
    loaded = load(member.folder)
    numbers = trials.seeds(seeds, loaded.experiment.seed)
    found = trials.trials(loaded, [], numbers, settings, ROOT)
    planned = Sweep(loaded, found, ROOT, launcher)
    code = sweep.run(planned, trials.describe(loaded, [], numbers, len(found)), jobs, True, Console())
    if code:
        raise SystemExit(code)
    return Side(loaded.name, {state.trial.seed: read_finished(state.run) for state in planned.states if state.run})
