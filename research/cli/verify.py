"""`python -m research verify`: checks that the layout does not change an experiment."""

import argparse
import importlib.util
import sys
from pathlib import Path

from parallel.errors import Mistake
from parallel.files import read_json
from research import ROOT
from research.cli.json_output import add_json_option, only_json_on_stdout, print_json
from research.cli.verbs import Parser
from research.cluster.environment import choose_accelerator
from research.config import experiment_folder
from research.tracking import metrics, run_folder

WHAT = """Takes the experiment's own config and classes, shrinks sizes but not structure, trains a few steps in plain torch and then on
every layout's real DeepSpeed engine, and compares losses, gradient norms, every gradient and every weight by logical name."""
STEP = "progress/step"
LOSS_TOLERANCE = 2e-5
"""Largest relative difference of the losses of two real runs in fp32 (docs/layouts.md)."""


def main(argv: list[str]) -> None:
    """Prints one row per layout and writes verify.json; exit code 1 if a layout fails."""
    parser = Parser("verify", WHAT)
    parser.add_argument("experiment", nargs="?", help="an experiment's folder")
    parser.add_argument("--ranks", type=int, default=4, choices=[1, 2, 4, 8], help="largest world, on this machine's CPU (default: 4)")
    parser.add_argument("--full", action="store_true", help="the whole product of layouts on 1, 2, 4 and 8 ranks: slow")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (default: 3)")
    parser.add_argument("--ledger", action="store_true", help="instead, count what each layout communicates, beside the closed forms")
    parser.add_argument("--types", action="store_true", help="instead, check the types of tensors with spmd_types; needs no ranks")
    parser.add_argument("--against", nargs=2, metavar=("RUN_A", "RUN_B"), help="instead, compare the rows of two real runs")
    add_json_option(parser, "the results, which are also kept in a file,")
    arguments = parser.parse_args(argv)
    if arguments.against:
        a, b = arguments.against
        raise SystemExit(compare_runs(a, b, arguments.json))
    if not arguments.experiment:
        raise Mistake("verify needs an experiment's folder → python -m research verify experiments/gpt_sotu")
    if arguments.steps < 1:
        raise Mistake(f"--steps {arguments.steps} is not a number of steps → use 1 or more")
    if arguments.ledger and arguments.types:
        raise Mistake("--ledger and --types are two different checks → run one at a time")
    if arguments.types and importlib.util.find_spec("spmd_types") is None:
        raise Mistake("verify --types needs the package spmd_types → pip install -r requirements-dev.txt")

    loaded = experiment_folder.load(arguments.experiment)
    choose_accelerator()  # before DeepSpeed is imported; torch begins here
    with only_json_on_stdout(arguments.json):
        code, results = _check(loaded.folder, arguments)
    if arguments.json:
        print_json(read_json(ROOT / loaded.experiment.track.runs / loaded.name / results))
    raise SystemExit(code)


def _check(folder: Path, arguments: argparse.Namespace) -> tuple[int, str]:
    """Runs the check that the command line asks for; returns the exit code and the name of the file with the results."""
    if arguments.ledger:
        from research.verification.ledger import ledger

        return ledger(folder, arguments.ranks), "ledger.json"
    if arguments.types:
        from research.verification.spmd_check import DEGREES, check_types

        return check_types(folder, DEGREES), "types.json"
    from research.verification.numbers import verify

    return verify(folder, arguments.ranks, arguments.full, arguments.steps), "verify.json"


def compare_runs(a: str, b: str, as_json: bool = False) -> int:
    """Prints the worst relative difference of two runs' losses and norms, and its step. Returns 1 if a loss differs too much, else 0."""
    rows = (metrics.read(run_folder.find(name).metrics) for name in (a, b))
    first, second = ({row[STEP]: row for row in of_one if isinstance(row.get(STEP), int)} for of_one in rows)
    worst = []
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        both = [step for step in first.keys() & second.keys() if key in first[step] and key in second[step]]
        if both:
            error, step = max((metrics.relative(first[step][key], second[step][key]), step) for step in both)
            worst.append({"key": key, "worst_difference": error, "step": step, "rows": len(both)})
    if not worst:
        raise Mistake(f"{a} and {b} have no row in common → compare runs that logged the same steps")
    if as_json:
        print_json(worst)
    else:
        lines = (
            f"{row['key']:16} worst difference {row['worst_difference']:.1e} at step {row['step']}, {row['rows']} rows" for row in worst
        )
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 1 if any(row["worst_difference"] > LOSS_TOLERANCE and row["key"].endswith("loss") for row in worst) else 0
