"""A real Slurm of one node, for tests: munged, slurmctld and slurmd with a configuration, ports and folders of their own.

Nothing of an installed Slurm's configuration is read or changed. The node claims more CPUs than the machine has, because the trainings are
tiny. There are two partitions: a job in `high` preempts one in `low`, which Slurm then requeues.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
CPUS = 8
GRACE = 60
"""Seconds that a preempted job has to end by itself."""
START_SECONDS = 60.0
CONFIG = """
ClusterName=tessera
SlurmctldHost={host}({address})
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldDebug=info
SlurmdDebug=info
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
MinJobAge=600
OverTimeLimit=0
NodeName={host} NodeAddr={address} CPUs={cpus} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=INFINITE State=UP
PartitionName=high Nodes={host} PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why Slurm cannot be started here; '' if it can."""
    if os.geteuid():
        return "slurmd needs root"
    absent = [program for program in PROGRAMS if shutil.which(program, path=SBIN) is None]
    return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge)" if absent else ""


class Slurm:
    """The daemons, and the commands that talk to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.environ |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SBIN}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Starts the three daemons in the foreground of this process, and waits until the node is idle."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        host, (controller, daemon) = socket.gethostname().partition(".")[0], _free_ports(2)
        values = {"host": host, "address": "127.0.0.1", "user": "root", "folder": self.folder, "cpus": CPUS, "grace": GRACE}
        (self.folder / "slurm.conf").write_text(CONFIG.format(**values, controller=controller, daemon=daemon))
        here = self.folder
        munge_files = [f"--key-file={key}", f"--socket={here}/munge.socket", f"--pid-file={here}/munged.pid"]
        munge_files += [f"--log-file={here}/munged.log", f"--seed-file={here}/munged.seed"]
        self._daemon("munged", "--foreground", "--force", *munge_files)
        self._until(lambda: (here / "munge.socket").exists(), "munged has no socket")
        self._daemon("slurmctld", "-D", "-f", str(here / "slurm.conf"))
        self._daemon("slurmd", "-D", "-f", str(here / "slurm.conf"), "-N", host)
        self._until(lambda: "idle" in self.command("sinfo", "--noheader", "--format=%T", check=False), "the node is not idle")

    def stop(self) -> None:
        """Cancels all jobs, waits for their processes, and ends the daemons."""
        if len(self.daemons) == 3:
            with contextlib.suppress(subprocess.SubprocessError):
                for job in self.jobs():
                    self.command("scancel", "--full", job, check=False)
                self._until(lambda: not self.jobs(), "jobs are left")
        for process in reversed(self.daemons):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self.daemons):
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def command(self, *words: str, check: bool = True, limit: float = 60, **more: Any) -> str:
        """A Slurm command's standard output."""
        done = subprocess.run(words, env=self.environ, capture_output=True, text=True, timeout=limit, **more)
        assert done.returncode == 0 or not check, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def jobs(self) -> list[str]:
        """The numbers of all jobs that wait, run or end."""
        return self.command("squeue", "--noheader", "--format=%A", check=False).split()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, Reason …"""
        words = self.command("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, limit: float = 240.0) -> dict[str, str]:
        """Waits until the job is in one of the states; returns what Slurm says of it."""
        self._until(lambda: self.job(number)["JobState"] in states, f"job {number} is not {' or '.join(states)}", limit)
        return self.job(number)

    def _daemon(self, *command: str) -> None:
        out = (self.folder / f"{command[0]}.out").open("wb")
        path = shutil.which(command[0], path=SBIN)
        assert path
        process = subprocess.Popen(
            [path, *command[1:]], env=self.environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
        self.daemons.append(process)
        out.close()

    def _until(self, happened: Any, otherwise: str, limit: float = START_SECONDS) -> None:
        deadline = time.monotonic() + limit
        while not happened():
            ended = [process.args for process in self.daemons if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}\n" for path in self.folder.glob("*.log"))
                logs += "".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1000:]}\n" for path in self.folder.glob("*.out"))
                raise AssertionError(f"{otherwise}; ended: {ended}\n{logs}\n{self.command('squeue', check=False)}")
            time.sleep(0.2)


@contextlib.contextmanager
def one_node() -> Iterator[Slurm]:
    """A running Slurm, in a short path: the name of a socket may have 108 characters."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        slurm = Slurm(Path(folder))
        try:
            slurm.start()
            yield slurm
        finally:
            slurm.stop()


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
