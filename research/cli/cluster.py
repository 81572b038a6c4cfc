"""`python -m research cluster experiments/NAME --slurm|--hostfile|--torchrun`: checks a layout, prints the job script for several nodes."""

import argparse
import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from parallel.errors import Mistake, listed
from research import ROOT
from research.cli.verbs import Parser, count
from research.cluster.environment import Launcher, Ranks, activate_command
from research.cluster.hostfile import Host, hostfile_script, torchrun_script
from research.cluster.slurm import SlurmJob, script
from research.config import Experiment
from research.config.checks import check_settings
from research.config.experiment_folder import LoadedExperiment, load
from research.config.overrides import parse
from research.config.settings import names
from research.training.job import Job, describe, resolve
from research.training.resume import AUTO, NEVER

WHAT = """Prints the script that starts an experiment on several nodes, after the checks that a launch with so many ranks would make.
Needs no GPU and no cluster. Nothing is written or started: redirect the output to a file, read it, and submit it.

Settings of the experiment may follow, as for launch.py: --parallel.tensor 2. docs/clusters.md is the whole way to a cluster."""
EXAMPLE = """examples:
  python -m research cluster experiments/gpt_sotu --slurm --nodes 2 --gpus 4 --time 12:00:00 --schedule.micro_batch_size 2 > job.sh
  python -m research cluster experiments/gpt_sotu --hostfile --hosts node1,node2 --gpus 4 --schedule.micro_batch_size 2 > job.sh"""
SHOWN = ("config", "layout", "batch", "model")
"""The lines of a run's header that a script repeats. The others depend on the machine."""
LAUNCHERS: dict[str, Launcher] = {"slurm": "srun", "hostfile": "deepspeed", "torchrun": "torchrun"}
SCRIPTS = {
    "slurm": "a script for sbatch: one srun, a signal before the time limit, and a requeue that goes on from the last checkpoint",
    "hostfile": "a script for the first host: the hostfile, .deepspeed_env, and deepspeed, which reaches the other hosts by ssh",
    "torchrun": "a script to be started on every host",
}
TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")
"""Slurm's forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds."""
WORD = re.compile(r"[^\s'\"\\$`#!]+")
"""What a name in a script may be made of."""


def main(argv: list[str]) -> None:
    """Prints the script; warnings go to standard error."""
    ours, settings = _divided(argv)
    parser = _parser()
    arguments = parser.parse_args(ours)
    hosts = _hosts(arguments)
    for name in ("partition", "account", "job_name"):
        if (value := getattr(arguments, name)) is not None and not WORD.fullmatch(value):
            raise Mistake(f"--{name} {value!r} is not one word that Slurm takes → use letters, digits and - _ .")
    if arguments.time is not None and not TIME.fullmatch(arguments.time):
        raise Mistake(f"--time {arguments.time!r} is not a time limit of Slurm → write hours:minutes:seconds, such as 24:00:00")

    job = checked_job(load(arguments.experiment), settings, LAUNCHERS[arguments.kind], len(hosts), hosts[0].slots)
    sys.stderr.write("".join(f"warn   {warning}\n" for warning in [*job.warnings, *_doubts(job, arguments.kind)]))
    launch = job.folder / "launch.py"
    words = [str(launch.relative_to(ROOT) if launch.is_relative_to(ROOT) else launch), *settings]
    described = [f"{label:<9}{text}" for label, text in describe(job) if label in SHOWN]
    activate = _activation() if arguments.activate is None else arguments.activate
    if arguments.kind == "slurm":
        print(script(_slurm_job(job, arguments, words, described, activate)), end="")
        return
    write = hostfile_script if arguments.kind == "hostfile" else torchrun_script
    on_path = activate or f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    print(write(job.name, hosts, ROOT, words, on_path, described), end="")


def checked_job(loaded: LoadedExperiment, settings: Sequence[str], launcher: Launcher, nodes: int, ranks_per_node: int) -> Job:
    """The job on rank 0 of `nodes` × `ranks_per_node` ranks. Raises the Mistake with which a launch on them would end."""
    experiment, overrides, options = parse(loaded.experiment, settings)
    if options.help or options.version or options.dry_run or options.check_cluster:
        raise Mistake("--help, --version, --dry-run and --check-cluster train nothing → give them to launch.py itself")
    if launcher == "srun" and _is_given("--resume", settings) and options.resume == NEVER:
        raise Mistake(f"--resume {NEVER} would begin again after each requeue → leave it out: the script says --resume {AUTO}")
    check_settings(experiment)
    _check_ranks(experiment, nodes, ranks_per_node)
    world = nodes * ranks_per_node
    ranks = Ranks(0, 0, world, ranks_per_node, launcher, master_addr="", master_port=0)
    watch_no_run = replace(options, dry_run=True)
    return resolve(replace(loaded, experiment=experiment), overrides, ranks, watch_no_run, list(settings))


def _parser() -> Parser:
    parser = Parser("cluster", WHAT, EXAMPLE)
    parser.add_argument("experiment", help="an experiment's folder")
    kind = parser.add_mutually_exclusive_group(required=True)
    for name, text in SCRIPTS.items():
        kind.add_argument(f"--{name}", action="store_const", const=name, dest="kind", help=text)
    parser.add_argument("--nodes", type=count, metavar="N", help="number of nodes")
    parser.add_argument("--gpus", type=count, required=True, metavar="N", help="GPUs, and therefore ranks, of each node")
    parser.add_argument("--cpu_only", action="store_true", help="the nodes have no GPUs: --gpus is the number of ranks of each node")
    parser.add_argument("--activate", metavar="COMMAND", help="shell command before Python starts (default: activates this Python's .venv)")
    parser.add_argument("--hosts", metavar="A,B", help="the hosts' names, for --hostfile and --torchrun (default: node1,node2 …)")
    slurm = parser.add_argument_group("for --slurm")
    slurm.add_argument("--time", metavar="H:M:S", help="time limit of one start; the job is requeued until the run has finished")
    slurm.add_argument("--partition", metavar="NAME", help="partition (default: Slurm's)")
    slurm.add_argument("--account", metavar="NAME", help="account that pays (default: yours)")
    slurm.add_argument("--job_name", metavar="NAME", help="name of the job (default: the experiment's)")
    slurm.add_argument("--cpus", type=count, metavar="N", help="CPU cores and threads of each rank (default: Slurm's)")
    slurm.add_argument("--grace", type=count, default=120, metavar="SECONDS", help="from the signal to the time limit (default: 120)")
    slurm.add_argument("--requeues", type=count, default=3, metavar="N", help="requeues in a row without a newer checkpoint (default: 3)")
    slurm.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="another option of sbatch: --sbatch=--qos=long")
    return parser


def _divided(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(this verb's words, the experiment's settings with their values). After `--` everything is a setting."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    settings_names = {*names(Experiment), "resume"}
    ours: list[str] = []
    settings: list[str] = []
    words = ours
    for word in argv[:end]:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            words = settings if name in settings_names or "." in name else ours
        words.append(word)
        words = ours if "=" in word and word.startswith("--") else words  # nothing follows --name=value
    return ours, [*settings, *argv[end + 1 :]]


def _hosts(arguments: argparse.Namespace) -> list[Host]:
    """The hosts with their ranks: those of --hosts, else node1 … as many as --nodes says."""
    named = [name.strip() for name in (arguments.hosts or "").split(",") if name.strip()]
    for name in named:
        if not WORD.fullmatch(name):
            raise Mistake(f"--hosts: {name!r} is not the name of a host → write names or addresses with commas, node1,node2")
    if len(set(named)) < len(named):
        raise Mistake(f"--hosts {arguments.hosts} names a host twice → name each host once")
    if arguments.nodes is None and not named:
        raise Mistake("--nodes is missing → add --nodes N, the number of nodes")
    if arguments.nodes is not None and named and len(named) != arguments.nodes:
        raise Mistake(f"--hosts names {len(named)} hosts, --nodes says {arguments.nodes} → leave --nodes out, or name as many")
    return [Host(name, arguments.gpus) for name in named or [f"node{number + 1}" for number in range(arguments.nodes)]]


def _check_ranks(experiment: Experiment, nodes: int, ranks_per_node: int) -> None:
    """Raises a Mistake if pipe × tensor does not divide the ranks, which names the nearest numbers of nodes and of GPUs that fit."""
    pipe, tensor, world = experiment.parallel.pipe, experiment.parallel.tensor, nodes * ranks_per_node
    unit = pipe * tensor
    if world % unit == 0:
        return
    fitting = []
    for option, number, other in (("--gpus", ranks_per_node, nodes), ("--nodes", nodes, ranks_per_node)):
        step = unit // math.gcd(unit, other)
        near = [near for near in (number // step * step, -(-number // step) * step) if near]
        fitting.append(f"{option} {listed(dict.fromkeys(near))}")
    raise Mistake(
        f"parallel.pipe × parallel.tensor = {pipe} × {tensor} = {unit} does not divide nodes × GPUs = {nodes} × {ranks_per_node} = {world} "
        f"→ use {', or '.join(fitting)}"
    )


def _doubts(job: Job, kind: str) -> list[str]:
    """Warnings of what works, but is probably not meant on a cluster."""
    experiment, doubts = job.experiment, []
    if experiment.checkpoints.every == 0:
        lost = "the job begins anew" if kind == "slurm" else "the run begins anew"
        doubts.append(f"checkpoints.every = 0: if a node fails, {lost} → add --checkpoints.every N")
    return doubts


def _activation() -> str:
    """The command that activates the virtual environment of this Python, by its full path; '' if it is in none."""
    is_virtual = activate_command(environ={}) is not None
    return f"source {shlex.quote(str(Path(sys.prefix) / 'bin' / 'activate'))}" if is_virtual else ""


def _slurm_job(job: Job, arguments: argparse.Namespace, words: list[str], described: list[str], activate: str) -> SlurmJob:
    """The arguments of the Slurm script."""
    resume = [] if _is_given("--resume", words) else ["--resume", AUTO]
    return SlurmJob(
        name=job.name,
        root=ROOT,
        runs=Path(job.experiment.track.runs),
        words=[*words, *resume],
        described=described,
        nodes=job.ranks.world // job.ranks.local_world,
        ranks_per_node=job.ranks.local_world,
        gpus=not arguments.cpu_only,
        activate=activate,
        python="python" if activate else sys.executable,
        job_name=arguments.job_name or job.name,
        cpus=arguments.cpus,
        time=arguments.time,
        partition=arguments.partition,
        account=arguments.account,
        grace=arguments.grace,
        requeues=arguments.requeues,
        options=arguments.sbatch,
    )


def _is_given(option: str, words: Sequence[str]) -> bool:
    """Whether the option is among the words, as `--resume X` or `--resume=X`."""
    return any(word.partition("=")[0] == option for word in words)
