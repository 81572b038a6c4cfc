"""`python -m research torture EXPERIMENT`: kills ranks at random moments, resumes, and checks that nothing is lost."""

import tempfile
from dataclasses import asdict
from pathlib import Path

from parallel.errors import Mistake
from research.cli.json_output import add_json_option, only_json_on_stdout, print_json
from research.cli.verbs import Parser
from research.cluster.environment import choose_accelerator
from research.config import experiment_folder as folders
from research.verification.torture import torture

WHAT = """Trains a small version of the experiment (its structure and code, a little text, twelve steps, a checkpoint every three) on two
ranks, kills a random rank with SIGKILL at a random moment and resumes with --resume auto, until the run is done. It then compares every
loss with those of an undisturbed run: as hexadecimal floats, bit for bit. Two data, two tensor and two pipe ranks take turns."""


def main(argv: list[str]) -> None:
    """Prints one line per trial and what was lost; exit code 1 if anything was."""
    parser = Parser("torture", WHAT)
    parser.add_argument("experiment", help="an experiment's folder")
    parser.add_argument("--trials", type=int, default=20, help="number of disturbed runs (default: 20)")
    parser.add_argument("--kills", type=int, default=2, help="largest number of kills per run (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="random seed: which rank to kill, and when (default: 0)")
    add_json_option(parser, "one line per trial")
    arguments = parser.parse_args(argv)
    if arguments.trials < 1 or arguments.kills < 1:
        raise Mistake("--trials and --kills are numbers from 1 → python -m research torture experiments/gpt_sotu --trials 20")
    loaded = folders.load(arguments.experiment)
    choose_accelerator()
    with tempfile.TemporaryDirectory() as place, only_json_on_stdout(arguments.json):
        trials, code = torture(loaded, Path(place), arguments.trials, arguments.kills, arguments.seed)
    for trial in trials if arguments.json else ():
        print_json(asdict(trial))
    raise SystemExit(code)
