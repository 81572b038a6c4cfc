"""Starts a tiny experiment through a real launcher, and keeps its output and its run folder. No process outlives its launch."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from research import ROOT
from research.tracking import metrics
from research.tracking.run_folder import RunFolder
from tests.parallel.test_process_identity import IN_A_NAMESPACE

MARK = "TESSERA_TEST_LAUNCH"
"""An environment variable that all processes of one launch inherit. Its value is unique to the launch."""
LIMIT = 240.0
"""Seconds until a launch is killed with all its processes. On two idle cores a launch takes ten to twenty."""
NOT_OURS = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "SLURM_", "OMPI_", "TORCHELASTIC_", "WANDB_", "DS_", "OMP_", "PYTHON")
WORDS = ("budget", "congress", "energy", "health", "jobs", "nation", "of", "peace", "people", "state", "the", "union", "war", "world")

TINY: dict[str, Any] = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.ffn_size": 64,
    "model.vocab_size": 391,
    "model.seq_length": 32,
    "data.tokenizer": "builtin:bpe-384",
    "schedule.steps": 6,
    "schedule.batch_size": 8,
    "schedule.micro_batch_size": 2,
    "schedule.validate_every": 3,
    "schedule.log_every": 1,
    "optimizer.lr": 3e-3,
    "optimizer.min_lr": 3e-4,
    "optimizer.clip": 1.0,
    "optimizer.decay": "cosine",
    "optimizer.warmup_steps": 2,
    "track.mode": "disabled",
}
"""A model of 30 thousand parameters for six steps. No tensor degree divides its vocabulary, so that it is padded."""


@dataclass(frozen=True)
class Ended:
    """A launch that has ended: its exit code (of srun the largest), its output, and its run folder if it made one."""

    code: int
    out: str
    err: str
    seconds: float
    run: RunFolder | None

    @property
    def folder(self) -> RunFolder:
        assert self.run is not None, f"exit code {self.code}, no run folder\n{self.out}\n{self.err}"
        return self.run

    def rows(self, key: str) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl that have `key`."""
        return [row for row in metrics.read(self.folder.metrics) if key in row]

    def column(self, key: str) -> list[float]:
        return [row[key] for row in self.rows(key)]

    @property
    def status(self) -> str:
        return json.loads(self.folder.run.read_text())["status"]


class Place:
    """A folder with two small texts, an empty home, and a cache and run folders that its launches share.

    Several processes may make it, one after the other: it is then the same one.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.home, self.runs = path, path / "home", path / "runs"
        self.train, self.validation = path / "train.txt", path / "validation.jsonl"
        self.home.mkdir(parents=True, exist_ok=True)
        self.train.write_text("\n\n".join(_sentence(number, 200) for number in range(40)))
        documents = [_sentence(number, 90) for number in range(1000, 1004)]
        self.validation.write_text("".join(json.dumps({"text": text + " — ½ of it."}) + "\n" for text in documents))

    def settings(self, changes: dict[str, Any]) -> list[str]:
        """The command line that makes any experiment tiny and keeps it in this place."""
        here = {"data.train": self.train, "data.validation": self.validation, "data.cache": self.path / "cache", "track.runs": self.runs}
        return [word for name, value in (TINY | here | changes).items() for word in (f"--{name}", str(value))]


class Launch:
    """A launch that is running."""

    def __init__(self, place: Place, commands: list[list[str]], cwd: Path, environs: list[dict[str, str]]) -> None:
        self.place, self.before, self.began = place, set(place.runs.glob("*/*/run.json")), time.monotonic()
        self.mark = uuid.uuid4().hex
        self.streams = [place.path / f"launch_{self.mark}_{i}" for i in range(len(commands))]
        self.processes = [
            _start(command, cwd, environ | {MARK: self.mark}, stream)
            for command, environ, stream in zip(commands, environs, self.streams, strict=True)
        ]

    def said(self, kind: str = "out") -> str:
        """Everything written so far to standard output ('out') or standard error ('err')."""
        return "".join(path.with_suffix(f".{kind}").read_text(errors="replace") for path in self.streams)

    def wait_for(self, words: str, limit: float = LIMIT) -> None:
        """Waits until standard output contains these words."""
        deadline = time.monotonic() + limit
        while words not in self.said():
            over = time.monotonic() > deadline or all(process.poll() is not None for process in self.processes)
            if over and words not in self.said():
                self.kill()
                raise AssertionError(f"never said {words!r}\n{self.said()}\n{self.said('err')}")
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        """Every process of this launch that is alive, including orphans: all have inherited its mark."""
        processes = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    processes.append(process)
        return processes

    def roles(self) -> dict[str, psutil.Process]:
        """The living processes by role: command (deepspeed, torchrun), launch.py (DeepSpeed's), rank 0, rank 1 …; others by name."""
        roles = {}
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                roles[_role(process)] = process
        return roles

    def interrupt(self) -> None:
        """Ctrl-C as a terminal sends it: SIGINT to every process of the foreground group."""
        for process in self.processes:
            os.killpg(process.pid, signal.SIGINT)

    def wait(self, limit: float = LIMIT) -> Ended:
        """Waits for the end of the launch. Fails with the output so far if it does not come in time."""
        deadline = time.monotonic() + limit
        try:
            codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {limit:.0f} s\n{self.said()}\n{self.said('err')}") from None
        finally:
            self.kill()
        folders = {path.parent.resolve() for path in set(self.place.runs.glob("*/*/run.json")) - self.before}
        if len(folders) > 1:  # of launches side by side: this one's folder stands in its header
            folders = {folder for folder in folders if f"{os.sep}{folder.name}\n" in self.said()}
        assert len(folders) <= 1, folders
        run = RunFolder(folders.pop()) if folders else None
        return Ended(max(codes, key=abs), self.said(), self.said("err"), time.monotonic() - self.began, run)

    def kill(self) -> None:
        """Kills every process of this launch that is still running."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self.processes:
            process.wait()


def launch(
    place: Place,
    launcher: str = "python",
    ranks: int = 1,
    experiment: str = "gpt_sotu",
    cwd: Path = ROOT,
    environ: dict[str, str] | None = None,
    port: int = 0,
    **changes: Any,
) -> Launch:
    """Starts `experiments/EXPERIMENT/launch.py`. `changes` are settings with __ for the dot: parallel__tensor=2."""
    file = ROOT / f"experiments/{experiment}/launch.py"
    settings = {name.replace("__", "."): value for name, value in changes.items()}
    words = [str(file.relative_to(ROOT) if cwd == ROOT else file), *place.settings(settings)]
    port, base = port or free_port(), _environment(place) | (environ or {})
    if launcher == "srun":
        return Launch(place, [[sys.executable, *words]] * ranks, cwd, [base | slurm(rank, ranks, port) for rank in range(ranks)])
    return Launch(place, [[*_launcher(launcher, ranks, port), *words]], cwd, [base])


def run(place: Place, *arguments: Any, limit: float = LIMIT, **settings: Any) -> Ended:
    """Launches, and waits for the end."""
    return launch(place, *arguments, **settings).wait(limit)


def free_port() -> int:
    """A port on which no process listens at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _launcher(name: str, ranks: int, port: int) -> list[str]:
    if name == "python":
        return [sys.executable]
    if name == "container":
        return [*IN_A_NAMESPACE, sys.executable]
    if name == "torchrun":
        return [*_command("torchrun", "torch.distributed.run"), "--nproc_per_node", str(ranks), "--master_port", str(port)]
    return [*_command("deepspeed", "deepspeed.launcher.runner"), "--num_gpus", str(ranks), "--master_port", str(port)]


def _command(script: str, module: str) -> list[str]:
    """The script beside this interpreter, which a person would type; its module if there is no script."""
    beside = Path(sys.executable).with_name(script)
    return [str(beside)] if beside.is_file() else [sys.executable, "-m", module]


def slurm(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment variables that srun sets for a task of a step on one node."""
    step = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(ranks), "SLURM_STEP_NODELIST": "127.0.0.1"}
    counts = {"SLURM_NTASKS": str(ranks), "SLURM_STEP_TASKS_PER_NODE": str(ranks), "SLURM_NNODES": "1"}
    return step | counts | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "MASTER_PORT": str(port)}


def _environment(place: Place) -> dict[str, str]:
    """The environment of a new terminal in which .venv is active, with an empty home and no W&B account."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_OURS)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"HOME": str(place.home), "VIRTUAL_ENV": sys.prefix, "PATH": path}


def _role(process: psutil.Process) -> str:
    """A process's role, by the script or module that it runs."""
    script = next((word for word in process.cmdline()[1:] if not word.startswith("-")), "")
    if script == "deepspeed.launcher.launch":
        return "launch.py"
    if script.endswith("/launch.py"):
        environ = process.environ()
        return f"rank {environ.get('RANK', environ.get('SLURM_PROCID', '0'))}"
    command = Path(script).name in ("deepspeed", "torchrun") or script in ("deepspeed.launcher.runner", "torch.distributed.run")
    return "command" if command else Path(process.cmdline()[0]).name


def _start(command: list[str], cwd: Path, environ: dict[str, str], stream: Path) -> subprocess.Popen:
    """Starts the command in a session of its own, with its output in files: with a pipe, the reader would wait for orphans."""
    with stream.with_suffix(".out").open("wb") as out, stream.with_suffix(".err").open("wb") as err:
        return subprocess.Popen(command, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)


def _sentence(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words)) + "."
