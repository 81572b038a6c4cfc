"""Environment of a process: rank and world from deepspeed, torchrun or srun, cores and threads, accelerators, master port, git commit.

The environment variables are read here and in few other places (tests/test_arrows.py names them).
"""

import base64
import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from parallel.errors import Mistake
from research.cluster.slurm_lists import expand_hosts, first_host, tasks_per_node

Launcher = Literal["deepspeed", "torchrun", "srun", "python"]
LOCALHOST = "127.0.0.1"
STEP_SIGNS = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
FIRST_SPECIAL_STEP = 0xFFFF_FFF0
"""From this number on, Slurm's steps were not started by srun: the batch script, an interactive shell, external processes."""
FIRST_PORT, PORTS = 15_000, 15_000
"""Master ports lie below Linux's ephemeral range, so that no outgoing connection happens to use one."""
PORT_OPTION = {"deepspeed": "--master_port N", "srun": "MASTER_PORT=N"}
"""The option by which a launcher takes another master port."""
RANKS_OPTION = {"deepspeed": "--num_gpus {}", "torchrun": "--nproc_per_node {}", "srun": "--ntasks-per-node {}"}
"""The option by which each launcher takes the number of ranks per node."""
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
"""The variable that names the network interface (or several, with commas) whose address gloo gives to the other ranks."""
SETS_NUMBERS = (
    *("DS_ACCELERATOR", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    *("TORCH_BLAS_PREFER_CUBLASLT", "DISABLE_ADDMM_CUDA_LT", "ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA"),
    *("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "PYTHONOPTIMIZE", "PYTORCH_NVFUSER_DISABLE", "TORCHDYNAMO_DISABLE"),
    *("NCCL_ALGO", "NCCL_PROTO", "NCCL_NET", "NCCL_P2P_LEVEL", "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS", "NCCL_BUFFSIZE"),
    *("NCCL_NTHREADS", "NCCL_CROSS_NIC", "NCCL_COLLNET_ENABLE", "NCCL_NVLS_ENABLE"),
)
"""Variables that change how numbers are rounded, or that NCCL needs equal on all ranks. They must be equal on all hosts."""
THREADS = "OMP_NUM_THREADS"
MOST_THREADS = 1024
"""More threads than this are taken for a slip: the OpenMP library ends the process if it cannot create them."""


@dataclass(frozen=True)
class Ranks:
    """This process's global and local rank, and the address at which the ranks meet. A world of one needs none: port 0."""

    rank: int
    local_rank: int
    world: int
    local_world: int
    launcher: Launcher
    master_addr: str
    master_port: int
    cores: int = 0
    """Cores that the launcher bound to this rank alone; 0: the local ranks share the cores that the process may use."""


ALONE = Ranks(0, 0, 1, 1, "python", LOCALHOST, 0)


def find_ranks(environ: Mapping[str, str] | None = None) -> Ranks:
    """The ranks that deepspeed, torchrun or srun has set; a world of one if nothing is set. Contradictions are Mistakes."""
    environ = os.environ if environ is None else environ
    if "RANK" in environ:
        ranks = _from_torch(environ)
    elif _is_slurm_step(environ):
        ranks = _from_slurm(environ)
    elif int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        raise Mistake("mpirun has set no RANK → launch with deepspeed, torchrun or srun")
    else:
        return ALONE
    if not (0 <= ranks.rank < ranks.world and 0 <= ranks.local_rank < ranks.local_world <= ranks.world):
        raise Mistake(
            f"{ranks.launcher} set rank {ranks.rank} of {ranks.world}, local rank {ranks.local_rank} of {ranks.local_world} → "
            "unset RANK, LOCAL_RANK and WORLD_SIZE in the shell if they are left over"
        )
    return ranks


def rank_hint(environ: Mapping[str, str] | None = None) -> int:
    """This process's rank as far as it is known, without raising: for an error message that names the rank."""
    environ = os.environ if environ is None else environ
    text = environ.get("RANK", environ.get("SLURM_PROCID", "0"))
    return int(text) if text.isdecimal() else 0


def threads_asked_for(environ: Mapping[str, str] | None = None) -> int | None:
    """The number of threads that OMP_NUM_THREADS sets; None if it is not set. Of a list such as 4,2 the first number counts.

    It may be the user's, or a launcher's: torchrun sets it to 1 on several ranks unless the user has set it, and deepspeed's
    --bind_cores_to_rank sets it to the cores of a rank.
    """
    text = (os.environ if environ is None else environ).get(THREADS, "").partition(",")[0].strip()
    if not text:
        return None
    if not (text.isdecimal() and len(text) < 5 and 1 <= int(text) <= MOST_THREADS):
        raise Mistake(f"{THREADS} = {text[:20]!r} is not a number of threads → set it to 1 … {MOST_THREADS}, or unset it")
    return int(text)


def threads_per_rank(ranks: Ranks, environ: Mapping[str, str] | None = None) -> int:
    """OMP_NUM_THREADS, or, where it is not set, the cores that this process may use, divided by the local ranks; at least 1."""
    if (asked_for := threads_asked_for(environ)) is not None:
        return asked_for
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(ranks.cores, usable) if ranks.cores else usable // ranks.local_world)


@contextlib.contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables for processes that are started inside, and restores them afterwards."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def kept_alive_by_ssh(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variable that lets pdsh, and so `deepspeed --hostfile`, notice within a minute that a host is gone. Else ssh waits for ever."""
    name = "PDSH_SSH_ARGS_APPEND"
    given = (os.environ if environ is None else environ).get(name, "")
    return {name: f"{given} -o ServerAliveInterval=15 -o ServerAliveCountMax=3".strip()}


def choose_accelerator() -> int:
    """Tell DeepSpeed to use the CPU where torch sees no accelerator. It would do the same, but with a warning on every rank.

    Returns the number of accelerators that this process can use. Must be called before DeepSpeed is imported. Imports torch.
    """
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return torch.accelerator.device_count()


def limit_kernel_cache(kernels: int) -> None:
    """Limits the kernels that oneDNN, and torch beside it, keep compiled. Variables that the user has set stay as they are.

    oneDNN compiles a kernel for each shape of weight and each number of rows. A server reads prompts of any number of tokens, and would
    keep 1,024 kernels in each of the two caches, of up to 100 KB each. It must be called before torch multiplies.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(kernels))


def refuse_shared_accelerators(ranks: Ranks, accelerators: int) -> None:
    """Raise a Mistake if this machine has accelerators, but fewer than local ranks: each rank needs one. On a CPU any number runs.

    srun may show each rank its own accelerators only (--gpus-per-task, --gpu-bind), so that their number says nothing about the
    machine. Ranks of srun that really share one are refused when they have met (parallel/distributed.py, refuse_shared_gpus).
    """
    if 0 < accelerators < ranks.local_world and ranks.launcher != "srun":
        way_out = f"add `{RANKS_OPTION[ranks.launcher].format(accelerators)}` to the {ranks.launcher} command"
        has = f"{accelerators} GPU" + ("s" if accelerators > 1 else "")
        raise Mistake(f"{ranks.local_world} ranks on this machine need a GPU each, torch sees {has} → {way_out}")


def numeric_variables(environ: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """The variables of SETS_NUMBERS; None where one is not set."""
    environ = os.environ if environ is None else environ
    return {name: environ.get(name) for name in SETS_NUMBERS}


def gloo_interfaces(environ: Mapping[str, str] | None = None) -> list[str]:
    """The network interfaces that GLOO_SOCKET_IFNAME names; none if it is not set."""
    text = (os.environ if environ is None else environ).get(GLOO_INTERFACE, "")
    return [name.strip() for name in text.split(",") if name.strip()]


def serves_store(ranks: Ranks, environ: Mapping[str, str] | None = None) -> bool:
    """Whether this rank serves the store at which all ranks meet: rank 0, unless torchrun's agent does."""
    environ = os.environ if environ is None else environ
    return ranks.rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def attempt(environ: Mapping[str, str] | None = None) -> str:
    """How often torchrun has restarted the ranks: they come to the same store again. '0' under other launchers."""
    return (os.environ if environ is None else environ).get("TORCHELASTIC_RESTART_COUNT", "0")


def node_names(ranks: Ranks, environ: Mapping[str, str] | None = None) -> list[str]:
    """The name of each rank's node as the launcher knows it, in rank order; empty where it does not say: under torchrun.

    srun lists the nodes of its step. DeepSpeed's launch.py, the parent of a rank, has the hosts and their ranks in its command line.
    """
    environ = os.environ if environ is None else environ
    names: list[str] = []
    if ranks.launcher == "srun":
        hosts = expand_hosts(next((environ[name] for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if name in environ), ""))
        counts = tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(ranks.local_world)))
        counts += [ranks.local_world] * (len(hosts) - len(counts))
        names = [host for host, count in zip(hosts, counts, strict=False) for _ in range(count)]
    elif ranks.launcher == "deepspeed":
        import psutil  # a package: without it `--version` must still answer

        with contextlib.suppress(psutil.Error, ValueError, AttributeError):
            words = psutil.Process().parent().cmdline()
            world_info = next((word.partition("=")[2] for word in words if word.startswith("--world_info=")), "")
            nodes = json.loads(base64.urlsafe_b64decode(world_info)) if world_info else {}
            names = [host for host, slots in nodes.items() for _ in slots]
    return names if len(names) == ranks.world else []


def activate_command(prefix: Path = Path(sys.prefix), environ: Mapping[str, str] | None = None) -> str | None:
    """'source .venv/bin/activate': what a user types before `python` means the Python of the virtual environment `prefix`.

    None if `prefix` is no virtual environment, or if the user's shell has activated it.
    """
    script, active = prefix / "bin" / "activate", (os.environ if environ is None else environ).get("VIRTUAL_ENV")
    is_virtual = script.is_file() and (prefix / "pyvenv.cfg").is_file()  # conda's base has bin/activate too
    if not is_virtual or (active and Path(active).resolve() == prefix.resolve()):
        return None
    near = os.path.relpath(script)
    return f"source {shlex.quote(str(script) if near.startswith('..') else near)}"


def refuse_taken_port(ranks: Ranks) -> None:
    """Check on rank 0, before 10 s of imports, that it can listen on the master port. Under torchrun the agent listens instead."""
    if ranks.rank > 0 or ranks.world == 1 or ranks.launcher == "torchrun":
        return
    with socket.socket(socket.AF_INET6 if ":" in ranks.master_addr else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's own server does
        try:
            probe.bind(("", ranks.master_port))
        except OSError as error:
            raise Mistake(
                f"master port {ranks.master_port} cannot be used ({error.strerror}) → add `{PORT_OPTION[ranks.launcher]}` with a free port"
            ) from error


def _from_torch(environ: Mapping[str, str]) -> Ranks:
    """From the variables of deepspeed's launcher or torchrun, which differ in the name of the number of local ranks."""
    launcher: Launcher = "torchrun" if "LOCAL_WORLD_SIZE" in environ else "deepspeed"
    local_world = "LOCAL_WORLD_SIZE" if launcher == "torchrun" else "LOCAL_SIZE"
    return Ranks(
        rank=_number(environ, "RANK"),
        local_rank=_number(environ, "LOCAL_RANK"),
        world=_number(environ, "WORLD_SIZE"),
        local_world=_number(environ, local_world),
        launcher=launcher,
        master_addr=_text(environ, "MASTER_ADDR"),
        master_port=_number(environ, "MASTER_PORT"),
    )


def _is_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this very process.

    A batch script or a shell from salloc may have SLURM_NTASKS > 1 and SLURM_PROCID = 0 too, but is a single process: it has
    no step, or one with a number that Slurm reserves. A process with SLURM_PROCID > 0 can only come from srun.
    """
    if "SLURM_PROCID" not in environ:
        return False
    if environ["SLURM_PROCID"] != "0":
        return True
    if int(environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", "0"))) >= FIRST_SPECIAL_STEP:
        return False
    return any(sign in environ for sign in STEP_SIGNS)


def _from_slurm(environ: Mapping[str, str]) -> Ranks:
    world = _number(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS")
    if "MASTER_PORT" in environ:
        port = _number(environ, "MASTER_PORT")
    else:  # equal on every rank of a step; most likely different for two jobs, or two steps of a job, on one node
        job, step = (int(environ.get(f"SLURM_{name}_ID", environ.get(f"SLURM_{name}ID", "0"))) for name in ("JOB", "STEP"))
        port = FIRST_PORT + (job * 17 + step) % PORTS
    hosts = next((environ[name] for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if name in environ), LOCALHOST)
    return Ranks(
        rank=_number(environ, "SLURM_PROCID"),
        local_rank=_number(environ, "SLURM_LOCALID"),
        world=world,
        local_world=_slurm_local_world(environ, world),
        launcher="srun",
        master_addr=environ.get("MASTER_ADDR") or first_host(hosts),
        master_port=port,
        cores=_number(environ, "SLURM_CPUS_PER_TASK") if "SLURM_CPUS_PER_TASK" in environ else 0,
    )


def _slurm_local_world(environ: Mapping[str, str], world: int) -> int:
    """Ranks on this node: from the step's own list, '2(x3),1', or else from the options of the job."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if name in environ:
            counts = tasks_per_node(environ[name])
            node = int(environ.get("SLURM_NODEID", "0"))
            return min(counts[node] if node < len(counts) else counts[-1], world)
    if environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1")) == "1":
        return world
    raise Mistake("srun says nothing of the ranks on this node → add `--ntasks-per-node N` to the srun command")


def _text(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise Mistake(f"the launcher set RANK but not {name} → launch with deepspeed, torchrun, srun or plain python")
    return environ[name]


def _number(environ: Mapping[str, str], name: str) -> int:
    text = _text(environ, name)
    if not text.isdecimal():
        raise Mistake(f"{name} = {text!r} in the environment is not a whole number → launch with deepspeed, torchrun or srun")
    return int(text)


def git_state(root: Path) -> tuple[str, bool]:
    """(short commit, whether the tree differs from it); ("unknown", False) without git, or if `root` is not the top of a repository."""
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != Path(root).resolve():
            return "unknown", False
        return _git(root, "rev-parse", "--short", "HEAD"), bool(_git(root, "status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return "unknown", False


def _git(root: Path, *arguments: str) -> str:
    """The output of a git command in `root`. Variables such as GIT_DIR are removed: inside a git hook they name another tree."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    process = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True, env=environ)
    return process.stdout.strip()
