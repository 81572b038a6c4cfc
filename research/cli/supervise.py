"""`python -m research supervise experiments/NAME`: launches an experiment, and again after each crash while there are newer checkpoints."""

import contextlib
import shlex
import shutil
import sys
from pathlib import Path

from parallel.errors import Mistake
from research import ROOT
from research.cli.verbs import Parser, suggestion
from research.config.experiment_folder import load
from research.config.overrides import parse
from research.reliability.supervisor import LaunchRecord, supervise
from research.tracking.run_folder import RunFolder
from research.training.resume import science_changes

WHAT = """Launches an experiment, and launches it again after a crash, with --resume RUN if its run has saved a checkpoint. Between two
launches it waits 1, 2, 4 … at most 60 seconds. It gives up after N restarts in a row without a newer checkpoint. A signal (SIGINT,
SIGTERM, SIGUSR1, SIGHUP) is passed on to all ranks, and nothing is launched after it. Nor is a launch repeated that refused its
settings (exit code 2) or stopped itself (3). The exit code is that of the last launch, 128 + n after signal n."""
EXAMPLE = 'example: python -m research supervise experiments/gpt_sotu --launcher "deepspeed --num_gpus 2" -- --parallel.tensor 2'


def main(argv: list[str]) -> None:
    """Supervises the launch. Ends with the last launch's exit code."""
    parser = Parser("supervise", WHAT)
    parser.epilog = EXAMPLE
    parser.add_argument("experiment", help="an experiment's folder; settings for its launch follow after --")
    parser.add_argument("--restarts", type=int, default=5, metavar="N", help="restarts in a row without a newer checkpoint (default: 5)")
    parser.add_argument("--launcher", default="deepspeed", metavar="COMMAND", help="what starts launch.py (default: deepspeed)")
    end = argv.index("--") if "--" in argv else len(argv)
    arguments, settings = parser.parse_args(argv[:end]), argv[end + 1 :]
    if arguments.restarts < 0:
        raise Mistake(f"--restarts {arguments.restarts} is not a number of restarts → use 0 or more")

    loaded = load(arguments.experiment)
    experiment, _, options = parse(loaded.experiment, settings)
    if options.help or options.dry_run:
        raise Mistake("--help and --dry-run start nothing that could crash → launch with them directly, without supervise")
    command = [*_launcher(arguments.launcher), str(Path(arguments.experiment) / "launch.py")]

    def is_ours(folder: RunFolder) -> bool:
        """Whether the run has our science and seed; where its config.json cannot be read, nothing speaks against it."""
        with contextlib.suppress(OSError, ValueError):
            return not science_changes(folder, loaded.folder, experiment)
        return True

    record = LaunchRecord(ROOT / experiment.track.runs / loaded.name, is_ours)
    raise SystemExit(supervise(command, settings, record, arguments.restarts))


def _launcher(text: str) -> list[str]:
    """The launcher's command. Its program is looked for beside this Python first: the environment need not be activated."""
    try:
        program, *arguments = shlex.split(text) or [""]
    except ValueError as error:
        raise Mistake(f"--launcher {text!r}: {str(error).lower()} → close it") from error
    path = shutil.which(program, path=str(Path(sys.executable).parent)) or shutil.which(program)
    if not path:
        known = suggestion(program, ["deepspeed", "torchrun", "srun", "python"])
        raise Mistake(f"--launcher {text!r}: there is no program {program!r}{known}")
    return [path, *arguments]
