"""`python -m research sweep FOLDER --seeds 5 --grid optimizer.lr=1e-3,3e-4`: trains every combination with every seed, each once."""

import argparse
import shlex
import sys
from pathlib import Path

from parallel.files import read_json
from research import ROOT
from research.ablation import sweep, trials
from research.ablation.sweep import DONE, FAILED, RUNNING, State, Sweep
from research.cli.cluster import LAUNCHERS, checked_job
from research.cli.json_output import add_json_option, print_json
from research.cli.supervise import launcher_command
from research.cli.verbs import Parser, count
from research.cluster.environment import activate_command
from research.cluster.exit_codes import SIGNALLED
from research.cluster.slurm import SlurmJob, script
from research.config.experiment_folder import load
from research.tracking import format as fmt
from research.tracking.acquire_lock import take
from research.tracking.console import Console
from research.training.job import describe
from research.training.resume import AUTO

WHAT = """Trains an experiment once for each seed and each combination of the grid's values, one after the other or --jobs at a time. The
same command goes on where it was stopped: what has been trained, by whomever, is not trained again, and an unfinished run goes on from its
checkpoint. The runs have one W&B group, and a tag for each factor. With --jobs, the output of each trial is in runs/NAME/sweeps/ID/.
Failures are reported, and the exit code is then 1. Settings that all trials share may follow after --, as for launch.py."""
EXAMPLE = """examples:
  python -m research sweep experiments/gpt_sotu --seeds 3
  python -m research sweep experiments/gpt_sotu --seeds 3 --grid optimizer.lr=1e-3,3e-4 --grid model.norm=layernorm,rmsnorm --jobs 2
  python -m research sweep experiments/gpt_sotu --seeds 3 --launcher "deepspeed --num_gpus 2" -- --schedule.steps 100
  python -m research sweep experiments/gpt_sotu --seeds 1,2,3 --emit slurm --gpus 4 > job.sh
  python -m research sweep experiments/gpt_sotu --seeds 3 --grid optimizer.lr=1e-3,3e-4 --emit wandb > sweep.yaml"""
PYTHON = "python"


def main(argv: list[str]) -> None:
    """Runs the sweep, or prints what runs it. Exits with 1 if a trial has failed, and with 128 + n after signal n."""
    end = argv.index("--") if "--" in argv else len(argv)
    arguments = _parser().parse_args(argv[:end])
    settings = argv[end + 1 :]
    loaded = load(arguments.experiment)
    factors = [trials.factor(text) for text in arguments.grid]
    seeds = trials.seeds(arguments.seeds, loaded.experiment.seed)
    found = trials.trials(loaded, factors, seeds, settings, ROOT)
    launcher = launcher_command(arguments.launcher)
    planned = Sweep(loaded, found, ROOT, [sys.executable] if arguments.launcher == PYTHON else launcher)
    if arguments.emit == "wandb":
        program = loaded.folder / "launch.py"
        planned.launcher = shlex.split(arguments.launcher)
        shown = program.relative_to(ROOT) if program.is_relative_to(ROOT) else program
        print(planned.wandb(factors, str(shown), settings), end="")
        return
    if arguments.emit == "slurm":
        print(_slurm_script(planned, arguments), end="")
        return
    console = Console(sys.stderr) if arguments.json else Console()
    described, to_logs = trials.describe(loaded, factors, seeds, len(found)), arguments.jobs > 1 or arguments.json
    code = run(planned, described, arguments.jobs, to_logs, console)
    if arguments.json:
        print_json(read_json(planned.file))
    raise SystemExit(code)


def _parser() -> Parser:
    parser = Parser("sweep", WHAT, EXAMPLE)
    parser.add_argument("experiment", help="an experiment's folder; settings that all trials share follow after --")
    parser.add_argument("--seeds", required=True, metavar="N|A,B", help="how many seeds, from the experiment's own on, or which")
    parser.add_argument(
        "--grid", action="append", default=[], metavar="NAME=V,V", help="a setting and its values; may be given several times"
    )
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="trials at the same time; they divide the cores (default: 1)")
    parser.add_argument(
        "--launcher", default=PYTHON, metavar="COMMAND", help='what starts launch.py, such as "deepspeed --num_gpus 2" (default: python)'
    )
    parser.add_argument(
        "--emit", choices=("slurm", "wandb"), help="print a job array for sbatch, or the definition for `wandb sweep`, and run nothing"
    )
    add_json_option(parser, "the trials, when all have ended,")
    slurm = parser.add_argument_group("for --emit slurm (all options: python -m research cluster --help)")
    slurm.add_argument("--nodes", type=count, default=1, metavar="N", help="nodes of each trial (default: 1)")
    slurm.add_argument("--gpus", type=count, default=1, metavar="N", help="GPUs, and therefore ranks, of each node (default: 1)")
    slurm.add_argument("--cpu_only", action="store_true", help="the nodes have no GPUs: --gpus is the number of ranks of each node")
    slurm.add_argument("--time", metavar="H:M:S", help="time limit of one start of a trial")
    slurm.add_argument("--partition", metavar="NAME")
    slurm.add_argument("--account", metavar="NAME")
    slurm.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="another option of sbatch: --sbatch=--qos=long")
    return parser


def run(planned: Sweep, described: str, jobs: int, to_logs: bool, console: Console) -> int:
    """Runs what is left under the sweep's lock, and prints the trials and their means. Returns the exit code.

    `to_logs`: what launches print goes to a file for each trial.
    """
    lock = take(planned.lock, f"the sweep {planned.id} of {planned.loaded.name}", "sweep", temporary=True)
    try:
        done = sum(state.status == DONE for state in planned.states)
        state_line = f"{done} of {len(planned.states)} are done · {_short(planned.file)}"
        console.header([("", f"sweep {planned.id} of {described}"), ("state", state_line)])
        stopped = planned.run(jobs, to_logs, lambda state: console.header([_line(state, len(planned.states))]))
    finally:
        lock.release()
    for label, runs, mean, spread in sweep.summary(planned.states):
        deviation = f" ± {spread:.4f}" if spread is not None else ""
        console.header([("mean", f"{label} · {mean:.4f}{deviation} bits/byte · {runs} run{'s' * (runs > 1)}")])
    failed = [state for state in planned.states if state.status == FAILED]
    for state in failed:
        place = _place(planned, state)
        console.warn(f"{state.trial.label} has failed with exit code {state.code} → see {place}; the same command tries it again")
    if stopped:
        return SIGNALLED + stopped
    return 1 if failed else 0


def _line(state: State, count: int) -> tuple[str, str]:
    """'[2/6] optimizer.lr=1e-3 seed=1338 · done in 2:57 · 2.0210 bits/byte · runs/gpt_sotu/1a2b3c'."""
    parts = [f"[{state.trial.number + 1}/{count}] {state.trial.label}"]
    if state.status != RUNNING and state.seconds is not None:
        parts.append(f"{state.status} in {fmt.duration(state.seconds)}")
    if state.status == DONE and (best := state.best) is not None:
        parts.append(f"{best:.4f} bits/byte")
    if state.run is not None:
        parts.append(state.run.shown)
    return ("begins" if state.status == RUNNING else state.status, " · ".join(parts))


def _place(planned: Sweep, state: State) -> str:
    log = planned.log_of(state.trial)
    return _short(log) if log.is_file() else state.run.shown if state.run else "what it printed above"


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _slurm_script(planned: Sweep, arguments: argparse.Namespace) -> str:
    """The job array of the trials that are not done, after the checks that a launch with so many ranks would make."""
    loaded = planned.loaded
    for state in planned.states:
        job = checked_job(loaded, state.trial.arguments, LAUNCHERS["slurm"], arguments.nodes, arguments.gpus)
    virtual = activate_command(environ={}) is not None
    activate = f"source {shlex.quote(str(Path(sys.prefix) / 'bin' / 'activate'))}" if virtual else ""
    return script(
        SlurmJob(
            name=loaded.name,
            root=ROOT,
            runs=Path(job.experiment.track.runs),
            words=[_short(loaded.folder / "launch.py"), "--resume", AUTO],
            described=[f"{label:<9}{text}" for label, text in describe(job) if label in ("layout", "batch", "model")],
            nodes=arguments.nodes,
            ranks_per_node=arguments.gpus,
            gpus=not arguments.cpu_only,
            activate=activate,
            python="python" if activate else sys.executable,
            job_name=f"{loaded.name}-sweep",
            time=arguments.time,
            partition=arguments.partition,
            account=arguments.account,
            options=arguments.sbatch,
            trials=planned.settings_left(),
            at_once=arguments.jobs,
        )
    )
