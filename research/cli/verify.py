"""`python -m research verify`: checks that the layout does not change an experiment."""

import importlib.util
import sys
from pathlib import Path

from parallel.errors import Mistake
from research.cli.verbs import Parser
from research.cluster.environment import choose_accelerator
from research.tracking import metrics, run_folder

WHAT = """Takes the experiment's own config and classes, shrinks sizes but not structure, trains a few steps in plain torch and then on
every layout's real DeepSpeed engine, and compares losses, gradient norms, every gradient and every weight by logical name."""
LOSS_TOLERANCE = 2e-5
"""Largest relative difference of the losses of two real runs in fp32 (DESIGN.md, promise 1)."""


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
    arguments = parser.parse_args(argv)
    if arguments.against:
        raise SystemExit(compare_runs(*arguments.against))
    if not arguments.experiment:
        raise Mistake("verify needs an experiment's folder → python -m research verify experiments/gpt_sotu")
    if arguments.steps < 1:
        raise Mistake(f"--steps {arguments.steps} is not a number of steps → use 1 or more")
    if arguments.ledger and arguments.types:
        raise Mistake("--ledger and --types are two different checks → run one at a time")
    if arguments.types and importlib.util.find_spec("spmd_types") is None:
        raise Mistake("verify --types needs the package spmd_types → pip install -r requirements-dev.txt")

    choose_accelerator()  # before DeepSpeed is imported
    folder = Path(arguments.experiment)
    if arguments.ledger:
        from research.verification.ledger import ledger

        raise SystemExit(ledger(folder, arguments.ranks))
    if arguments.types:
        from research.verification.spmd_check import DEGREES, check_types

        raise SystemExit(check_types(folder, DEGREES))
    from research.verification.numbers import verify

    raise SystemExit(verify(folder, arguments.ranks, arguments.full, arguments.steps))


def compare_runs(a: str, b: str) -> int:
    """Prints the worst relative difference of two runs' losses and norms, and its step. Returns 1 if a loss differs too much, else 0."""
    first, second = ({row["progress/step"]: row for row in metrics.read(run_folder.find(name).metrics)} for name in (a, b))
    passed = None
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        both = [step for step in first.keys() & second.keys() if key in first[step] and key in second[step]]
        if both:
            error, step = max((metrics.relative(first[step][key], second[step][key]), step) for step in both)
            sys.stdout.write(f"{key:16} worst difference {error:.1e} at step {step}, {len(both)} rows\n")
            passed = passed is not False and (error <= LOSS_TOLERANCE or not key.endswith("loss"))
    if passed is None:
        raise Mistake(f"{a} and {b} have no row in common → compare runs that logged the same steps")
    return 0 if passed else 1
