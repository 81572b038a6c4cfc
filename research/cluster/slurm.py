"""The job script for Slurm that `python -m research cluster --slurm` prints: allocation, one srun, and what follows after each exit code.

Slurm requeues a job by itself after a node failure, and after a preemption if the job has not ended within its grace time. A run that is
told to stop saves a checkpoint and ends by itself, so the script has to requeue the job. It does so by the run's exit code.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from research.cluster.exit_codes import NOT_AGAIN

HEAD = """#!/bin/bash
{options}
#
# {title}
{described}
#
# Submit it on a login node: sbatch THIS_FILE. The checkout, the virtual environment, the data and the runs folder must be at the same paths
# on all nodes. sbatch hands its own environment on to the job, WANDB_* and NCCL_* included. Only rank 0, on the first node, talks to W&B.
"""
ARRAY = """
# One task of the array is one trial: these are its settings.
case $SLURM_ARRAY_TASK_ID in
{cases}
esac
"""
BODY = """
{activate}
{threads}
{array}
# A rank that ends early must not take the others along: rank 0 may still be writing the checkpoint. Ranks notice when one has failed.
code=0
srun --kill-on-bad-exit=0 --wait=0 {python} \\
    {command} || code=$?

case $code in
    0) exit 0 ;;             # all steps were taken
    {not_again}) exit $code ;; # a mistake; a run that stopped itself, or whose folder is not its own: it would end in the same way again
esac

# 138 and 143: SIGUSR1 before the time limit, or SIGTERM at a preemption; the checkpoint is saved. Slurm does not requeue a job that has
# ended by itself. Anything else is a crash, and --resume goes on from the last checkpoint. The job's log says how often that has brought
# no newer one.
log=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p')
run=$(sed -n 's/.* run {name}-\\([0-9a-f]*\\) .*/\\1/p' "$log" | tail -n 1)
saved=$(cat {runs}/{name}/"${{run:-none}}"/checkpoints/latest 2>/dev/null || echo no-checkpoint)
before=$(sed -n 's/^requeue  .* after \\([^ ]*\\): .*/\\1/p' "$log" | tail -n 1)
count=$(sed -n 's/^requeue  .* (\\([0-9]*\\) of .*/\\1/p' "$log" | tail -n 1)
if [ "$saved" = "${{before:-no-checkpoint}}" ]; then count=$((${{count:-0}} + 1)); else count=0; fi
if [ "$count" -gt {requeues} ]; then
    echo "error  exit code $code after $saved: {requeues} requeues have brought no newer checkpoint, so the job ends"
    exit $code
fi
echo "requeue  exit code $code after $saved: the job is requeued ($count of {requeues} times without a newer checkpoint)"
scontrol requeue "$SLURM_JOB_ID" || echo "error  Slurm refuses to requeue the job: submit the script again"
exit $code
"""


@dataclass(frozen=True)
class SlurmJob:
    """What the script asks Slurm for, and what it runs."""

    name: str
    """The experiment's name, which is that of its folder of runs."""
    root: Path
    """The checkout, in which the job runs."""
    runs: Path
    """The folder with NAME/ID/ of each run, from `root`."""
    words: Sequence[str]
    """launch.py and its settings, from `root`."""
    described: Sequence[str]
    """The layout and the batch, in words."""
    nodes: int
    ranks_per_node: int
    gpus: bool
    """Whether each rank needs a GPU of its own."""
    activate: str
    """The command that makes `python` the right one; '' if `python` is a full path."""
    python: str
    job_name: str
    cpus: int | None = None
    """CPU cores of each rank; None: what the partition gives."""
    time: str | None = None
    """Slurm's time limit, such as 24:00:00; None: the partition's."""
    partition: str | None = None
    account: str | None = None
    grace: int = 120
    """Seconds before the time limit at which the ranks are told to stop."""
    requeues: int = 3
    """Requeues without a newer checkpoint after which the job ends."""
    options: Sequence[str] = ()
    """More options of sbatch, such as --constraint=a100."""
    trials: Sequence[Sequence[str]] = ()
    """The settings of each task of a job array, which follow `words`; none: the job is no array."""
    at_once: int = 1
    """How many tasks of the array run at the same time."""


def script(job: SlurmJob) -> str:
    """The whole script. It must be submitted from no particular folder: sbatch changes to the checkout."""
    described = "\n".join(f"# {line}" for line in job.described)
    title = f"{job.name} on {job.nodes} × {job.ranks_per_node} ranks, written by `python -m research cluster`"
    threads = "# Each rank computes with OMP_NUM_THREADS threads, and where that is not set, with its share of the cores that it may use."
    if job.cpus:
        threads = f"export OMP_NUM_THREADS={job.cpus} SRUN_CPUS_PER_TASK={job.cpus}  # srun does not take --cpus-per-task from sbatch"
    cases = "\n".join(f"    {task}) trial=({shlex.join(settings)}) ;;" for task, settings in enumerate(job.trials))
    body = BODY.format(
        activate=job.activate or "# The Python below needs no activation.",
        threads=threads,
        python=shlex.quote(job.python),
        array=ARRAY.format(cases=cases) if job.trials else "",
        command=shlex.join(job.words) + (' "${trial[@]}"' if job.trials else ""),
        name=job.name,
        runs=shlex.quote(str(job.runs)),
        requeues=job.requeues,
        not_again=" | ".join(map(str, NOT_AGAIN)),
    )
    return HEAD.format(options="\n".join(f"#SBATCH {option}" for option in _options(job)), title=title, described=described) + body


def _options(job: SlurmJob) -> list[str]:
    """The options of sbatch, one a line."""
    options = [f"--job-name={shlex.quote(job.job_name)}", f"--nodes={job.nodes}", f"--ntasks-per-node={job.ranks_per_node}"]
    options += [f"--array=0-{len(job.trials) - 1}%{job.at_once}"] if job.trials else []
    options += [f"--gpus-per-node={job.ranks_per_node}"] if job.gpus else []
    options += [f"--cpus-per-task={job.cpus}"] if job.cpus else []
    for name, value in (("time", job.time), ("partition", job.partition), ("account", job.account)):
        options += [f"--{name}={shlex.quote(value)}"] if value else []
    options += [f"--chdir={shlex.quote(str(job.root))}", "--output=slurm-%x-%j.log", "--open-mode=append", "--requeue"]
    return [*options, f"--signal=USR1@{job.grace}", *job.options]
