"""`python -m research supervise experiments/NAME`: launches an experiment, and again after each crash while there are newer checkpoints."""

import contextlib
import itertools
import math
import shlex
import shutil
import sys
from pathlib import Path

from parallel.errors import Mistake
from research import ROOT
from research.cli.verbs import Parser, suggestion
from research.cluster.hostfile import read as read_hostfile
from research.config import Experiment
from research.config.experiment_folder import load
from research.config.layout import batch_sizes
from research.config.overrides import parse
from research.reliability.hosts import HostLauncher, Shape
from research.reliability.supervisor import LaunchRecord, supervise
from research.tracking.run_folder import RunFolder
from research.training.resume import science_changes

WHAT = """Launches an experiment, and launches it again after a crash, with --resume RUN if its run has saved a checkpoint. Between two
launches it waits 1, 2, 4 … at most 60 seconds. It gives up after N restarts in a row without a newer checkpoint. A signal (SIGINT,
SIGTERM, SIGUSR1, SIGHUP) is passed on to all ranks, and nothing is launched after it. Nor is a launch repeated that refused its
settings (exit code 2), stopped itself (3), or has lost its folder, to another process or because it was deleted (6). If the disk was full
(4), it waits for room, 1 to 10 minutes each time, and counts no restart; if a checkpoint was damaged (5), it sets it aside and goes on
from the newest whole one. The exit code is that of the last launch, 128 + n after signal n. The launch is given as one would type it, or
as an experiment's folder with --launcher and, after --, its settings.
With `deepspeed --hostfile FILE`, a launch waits until all hosts answer ssh and no rank of the last launch is left on them. With --shrink
it goes on with the hosts that answer, on fewer data ranks and with the same batch, and on all of them again at the next restart."""
EXAMPLE = """examples: python -m research supervise experiments/gpt_sotu --launcher "deepspeed --num_gpus 2" -- --parallel.tensor 2
python -m research supervise --shrink deepspeed --hostfile hosts experiments/gpt_sotu/launch.py --parallel.tensor 2"""
LAUNCH = "launch.py"
NOT_OVER_PDSH = ("--include", "-i", "--exclude", "-e", "--num_nodes", "--num_gpus", "--num_accelerators", "--launcher", "--no_ssh")
"""Options of deepspeed that choose other ranks than the hostfile's, or another way to the hosts than pdsh."""


def main(argv: list[str]) -> None:
    """Supervises the launch. Ends with the last launch's exit code."""
    parser = Parser("supervise", WHAT)
    parser.epilog = EXAMPLE
    parser.add_argument("experiment", help="an experiment's folder; settings for its launch follow after --")
    parser.add_argument("--restarts", type=int, default=5, metavar="N", help="restarts in a row without a newer checkpoint (default: 5)")
    parser.add_argument("--launcher", default="deepspeed", metavar="COMMAND", help="what starts launch.py (default: deepspeed)")
    parser.add_argument("--shrink", action="store_true", help="with deepspeed --hostfile: go on with the hosts that answer")
    ours, settings = _divided(argv)
    arguments = parser.parse_args(ours)
    if arguments.restarts < 0:
        raise Mistake(f"--restarts {arguments.restarts} is not a number of restarts → use 0 or more")

    loaded = load(arguments.experiment)
    experiment, _, options = parse(loaded.experiment, settings)
    if options.trains_nothing:
        raise Mistake("--help, --version, --dry-run and --check-cluster train nothing → launch with them directly, without supervise")
    command = [*launcher_command(arguments.launcher), str(Path(arguments.experiment) / LAUNCH)]

    def is_ours(folder: RunFolder) -> bool:
        """Whether the run has our science and seed; where its config.json cannot be read, nothing speaks against it."""
        with contextlib.suppress(OSError, ValueError):
            return not science_changes(folder, loaded.folder, experiment)
        return True

    record = LaunchRecord(ROOT / experiment.track.runs / loaded.name, is_ours)
    on_hosts = _host_launcher(command, experiment, arguments.shrink)
    raise SystemExit(supervise(command, settings, record, arguments.restarts, on_hosts))


def _divided(argv: list[str]) -> tuple[list[str], list[str]]:
    """(this verb's words, the settings of the launch). A launch that is written out becomes --launcher, the experiment and its settings."""
    end = argv.index("--") if "--" in argv else len(argv)
    script = next((i for i, word in enumerate(argv[:end]) if Path(word).name == LAUNCH), None)
    if script is None:
        return argv[:end], argv[end + 1 :]
    begin = 0  # the launcher's program is the first word that is neither an option of ours nor the value of one
    while begin < script and argv[begin].startswith("-"):
        begin += 2 if argv[begin] in ("--restarts", "--launcher") else 1
    launcher = ["--launcher", shlex.join(argv[begin:script])] if begin < script else []
    return [*argv[:begin], *launcher, str(Path(argv[script]).parent)], argv[script + 1 :]


def _host_launcher(command: list[str], experiment: Experiment, shrink: bool) -> HostLauncher | None:
    """What launches on the hosts of a hostfile; None for a launch without one."""
    words = [word for joined in command[1:-1] for word in joined.split("=", 1)]
    after = dict(itertools.pairwise(words))
    path = after.get("--hostfile", after.get("-H"))
    other = next((word for word in words if word in NOT_OVER_PDSH), None)
    if Path(command[0]).name != "deepspeed" or path is None or other:
        if shrink:
            wrong = f"{other} does not go with it" if other else "it needs a hostfile"
            raise Mistake(
                f"--shrink chooses among the hosts of `deepspeed --hostfile FILE`, and {wrong} → write hosts and slots in FILE alone"
            )
        return None
    parallel, schedule = experiment.parallel, experiment.schedule
    shape = Shape(parallel.pipe, parallel.tensor, math.gcd(*batch_sizes(schedule).sizes), schedule.micro_batch_size)
    port = after.get("--ssh_port", "")
    return HostLauncher(command, read_hostfile(Path(path)), shape, Path.cwd(), shrink, int(port) if port.isdecimal() else None)


def launcher_command(text: str) -> list[str]:
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
