"""DeepSpeed's hostfile: reads and writes it, and the script that `python -m research cluster --hostfile` prints. torchrun's, too.

A hostfile has a line per host, `node1 slots=8`: slots are the ranks that it runs. Empty lines, and those that begin with #, do not count.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from parallel.errors import Mistake

LINE = re.compile(r"(\S+)\s+slots=(\d+)")
"""DeepSpeed 0.19.8's own pattern (deepspeed/launcher/runner.py): what follows the number is ignored."""
TRAVELS = ("WANDB_", "NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "DS_ACCELERATOR")
"""Variables, by how their names begin, that ranks on other hosts need and that DeepSpeed does not take there by itself on every device."""
SECRET = "WANDB_API_KEY"
HOSTFILE_SCRIPT = """#!/bin/bash
# {title}
{described}
#
# Run it on the first host. Each host must reach every other one by ssh without a password. The checkout, the virtual environment, the
# data and the runs folder must be at the same paths on all hosts: DeepSpeed changes to this folder there, and runs this Python.
set -euo pipefail
cd {root}
{activate}

cat > {file} <<'END'
{hosts}
END

# What of the environment travels: DeepSpeed 0.19.8 exports the variables whose names begin with PYTHON, MLFLOW, MV2 or UCX, on NVIDIA GPUs
# those with NCCL too, and the lines of .deepspeed_env in the home and in this folder, which is written anew here. Nothing else travels,
# not even PATH. An exported variable can be read by every user of the hosts (ps), so W&B's key is left out: say `wandb login` on the first
# host. Rank 0 runs there, and is the only one to need it.
env -0 | grep -zE '^({travels})[A-Za-z0-9_]*=[A-Za-z0-9@%+=:,./_-]*$' | grep -zv '^{secret}=' | tr '\\0' '\\n' > .deepspeed_env || true

# With `python -m research supervise` before `deepspeed`, the run is started again after a crash; with `supervise --shrink`, on fewer hosts
# if one of them does not answer.
exec deepspeed --hostfile {file} {words}
"""
TORCHRUN_SCRIPT = """#!/bin/bash
# {title}
{described}
#
# Run it on each of the {nodes} hosts, within a few minutes. The checkout, the data and the runs folder must be at the same paths on all.
# Each host has an environment of its own: set NCCL_*, GLOO_* and OMP_NUM_THREADS on all of them. torchrun sets OMP_NUM_THREADS to 1
# unless it is set.
set -euo pipefail
cd {root}
{activate}

exec torchrun --nnodes {nodes} --nproc_per_node {slots} --rdzv_backend c10d --rdzv_endpoint {endpoint} --rdzv_id {name} \\
    {words}
"""
RENDEZVOUS_PORT = 29400
"""torchrun's own default for its c10d rendezvous."""


class Host(NamedTuple):
    """A host, and the number of ranks that it runs."""

    name: str
    slots: int


def parse(text: str, source: str) -> list[Host]:
    """The hosts of a hostfile's text, as DeepSpeed reads it. `source` names the file in a Mistake."""
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        match = LINE.match(line.strip())
        if match is None or int(match[2]) == 0:
            raise Mistake(f"{source}:{number}: {line.strip()[:80]!r} is not a host and its ranks → write it like `node1 slots=8`")
        if match[1] in (host.name for host in hosts):
            raise Mistake(f"{source}:{number}: {match[1]} is named twice → name each host once, with all of its slots")
        hosts.append(Host(match[1], int(match[2])))
    if not hosts:
        raise Mistake(f"{source} names no host → write one line per host, like `node1 slots=8`")
    return hosts


def read(path: Path) -> list[Host]:
    """The hosts of a hostfile."""
    if not path.is_file():
        raise Mistake(f"there is no hostfile {path} → write one line per host, like `node1 slots=8`")
    return parse(path.read_text(encoding="utf-8"), str(path))


def text_of(hosts: Sequence[Host]) -> str:
    """The hostfile's lines."""
    return "\n".join(f"{host.name} slots={host.slots}" for host in hosts)


def hostfile_script(name: str, hosts: Sequence[Host], root: Path, words: Sequence[str], activate: str, described: Sequence[str]) -> str:
    """Writes hosts and .deepspeed_env into the checkout, then starts all ranks by `deepspeed`. `words`: launch.py and its settings."""
    return HOSTFILE_SCRIPT.format(
        title=_title(name, hosts),
        described="\n".join(f"# {line}" for line in described),
        root=shlex.quote(str(root)),
        activate=activate,
        file=shlex.quote(f"hosts-{name}"),
        hosts=text_of(hosts),
        travels="|".join(TRAVELS),
        secret=SECRET,
        words=shlex.join(words),
    )


def torchrun_script(name: str, hosts: Sequence[Host], root: Path, words: Sequence[str], activate: str, described: Sequence[str]) -> str:
    """Starts this host's ranks by `torchrun`; they meet the others' at the first host. All hosts have the same number of slots."""
    return TORCHRUN_SCRIPT.format(
        title=_title(name, hosts),
        described="\n".join(f"# {line}" for line in described),
        root=shlex.quote(str(root)),
        activate=activate,
        nodes=len(hosts),
        slots=hosts[0].slots,
        endpoint=f"{hosts[0].name}:{RENDEZVOUS_PORT}",
        name=name,
        words=shlex.join(words),
    )


def _title(name: str, hosts: Sequence[Host]) -> str:
    return f"{name} on {len(hosts)} × {hosts[0].slots} ranks, written by `python -m research cluster`"
