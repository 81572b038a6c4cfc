"""`python -m research supervise experiments/NAME`: launches an experiment, again after each crash, for as long as it gets on."""

import argparse
import shlex
import shutil
import sys
from enum import Enum
from pathlib import Path

from parallel.errors import Mistake
from research.attempt import Launches
from research.command_line import parse
from research.experiment import load
from research.parents import LAUNCHER_GONE
from research.record import Record
from research.run_folder import FINISHED, INTERRUPTED
from research.signals import SIGNALLED, SIGNALS
from research.verbs import Parser, nearest

ROOT = Path(__file__).resolve().parent.parent
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
NOT_AGAIN = (2, 3)
"""Exit codes that the same launch would only give again: a mistake, and a run that has stopped itself."""
STOPPED = {code for number in SIGNALS for code in (-number, SIGNALLED + number)} | {256 - number for number in SIGNALS if number > 1}
"""Exit codes of what a signal has ended: by itself, as shells write it, and as DeepSpeed passes on the first (not SIGHUP: 255 is ssh's)."""
WHAT = """Launches an experiment and launches it again after a crash, with --resume auto where it has saved a checkpoint. Between two
launches it waits 1, 2, 4 … at most 60 seconds, and it gives up after N restarts in a row that have brought no newer checkpoint.
A signal (SIGINT, SIGTERM, SIGUSR1, SIGHUP) goes on to all ranks, and then nothing is launched again; nor is what refuses
its settings (exit code 2) or has stopped itself (3). The exit code is that of the last launch, 128 + n after signal n."""
EXAMPLE = 'example: python -m research supervise experiments/gpt_sotu --launcher "deepspeed --num_gpus 2" -- --parallel.tensor 2'


class Outcome(Enum):
    """What is to be done after a launch: nothing more, for one of two reasons, or another one."""

    OVER = "over"
    STOPPED = "stopped"
    CRASHED = "crashed"


def main(argv: list[str]) -> None:
    """Ends with the exit code of the last launch."""
    place = argv.index("--") if "--" in argv else len(argv)
    asked, settings = _arguments(argv[:place]), argv[place + 1 :]
    loaded = load(asked.experiment)
    experiment, _, options = parse(loaded.experiment, settings)
    if options.help or options.dry_run:
        raise Mistake("--help and --dry-run start nothing that could crash → launch with them directly, without supervise")
    command = [*_launcher(asked.launcher), str(Path(asked.experiment) / "launch.py")]
    raise SystemExit(supervise(command, settings, Record(ROOT / experiment.track.runs / loaded.name), asked.restarts))


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("supervise", WHAT)
    parser.epilog = EXAMPLE
    parser.add_argument("experiment", help="an experiment's folder; settings for its launch follow after --")
    parser.add_argument("--restarts", type=int, default=5, metavar="N", help="restarts in a row without a newer checkpoint (default: 5)")
    parser.add_argument("--launcher", default="deepspeed", metavar="COMMAND", help="what starts launch.py (default: deepspeed)")
    asked = parser.parse_args(argv)
    if asked.restarts < 0:
        raise Mistake(f"--restarts {asked.restarts} is not a number of restarts → use 0 or more")
    return asked


def _launcher(text: str) -> list[str]:
    """The launcher's words; its program is looked for beside this Python first: nobody need have activated the environment."""
    program, *words = shlex.split(text) or [""]
    found = shutil.which(program, path=str(Path(sys.executable).parent)) or shutil.which(program)
    if not found:
        known = nearest(program, ["deepspeed", "torchrun", "srun", "python"])
        raise Mistake(f"--launcher {text!r}: there is no program {program!r}{known}")
    return [found, *words]


def supervise(command: list[str], settings: list[str], record: Record, restarts: int) -> int:
    """Launches `command` with `settings` until there is nothing more to do; returns the exit code."""
    launches, given, tries = Launches(), settings, 0
    while True:
        record.begin()
        code = launches.run([*command, *given])
        tries = 0 if record.end() else tries
        outcome = outcome_of(code, launches.signal, *record.state())
        if outcome is not Outcome.CRASHED or tries == restarts:
            break
        pause = pause_before(tries)
        tries, given = tries + 1, record.settings(settings)
        _say(f"{_crash(code, record)} → launched again in {pause:.0f} s (restart {tries} of {restarts} without a newer checkpoint)")
        launches.pause(pause)
        if launches.signal:
            break
    if outcome is Outcome.CRASHED and not launches.signal:
        _say(f"gives up: {_crash(code, record)}, {tries} restarts have brought no newer checkpoint")
    return _shown(-launches.signal if launches.signal and outcome is not Outcome.OVER else code)


def pause_before(restart: int) -> float:
    """Seconds before the restart of this number, from 0."""
    return min(FIRST_PAUSE * 2**restart, LONGEST_PAUSE)


def outcome_of(code: int, signalled: int, status: str, reason: str) -> Outcome:
    """Judged by the launch's exit code, the signal that went on to it (0: none), and what run.json says: launchers give 0 for anything."""
    if status == FINISHED or code in NOT_AGAIN:
        return Outcome.OVER
    stopped = status == INTERRUPTED and not reason.startswith(LAUNCHER_GONE)
    return Outcome.STOPPED if signalled or stopped or code in STOPPED else Outcome.CRASHED


def _crash(code: int, record: Record) -> str:
    """'exit code 1 at step 120 of runs/x/7f3a2c (RuntimeError: …)', as far as it is known."""
    where = f" after a checkpoint at step {record.last}" if record.last >= 0 else " before any checkpoint"
    reason = record.state()[1]
    folder = f", {record.run.title}" if record.run else ""
    return f"exit code {_shown(code)}{where}{folder}" + (f" ({reason})" if reason else "")


def _shown(code: int) -> int:
    """The exit code as a shell shows it."""
    return SIGNALLED - code if code < 0 else code


def _say(text: str) -> None:
    sys.stderr.write(f"supervise  {text}\n")
    sys.stderr.flush()
