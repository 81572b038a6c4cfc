"""Several hosts on one machine, in Linux namespaces: each with its own network, processes, name, mounts, home, /etc/hosts and sshd.

A `Cluster` is one process that makes a user, network, mount and pid namespace: it holds the switch, a bridge to which one cable (a veth
pair) leads from every host. It ends when its standard input is closed, and then the kernel ends every process of every host and removes
the interfaces, so nothing is left however the tests end. A host's processes run as an ordinary user, in a user namespace of their own.
The outer machine's files are there on all hosts, at the same paths: these are the shared disk. `Host.hide` and `Host.replace` give one
host a folder or a file of its own. Nothing can reach the outer network.
"""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from research import ROOT
from tests.research.helpers.launches import LIMIT, MARK, Launch, Place, _command, _environment, _role

PROGRAMS = ("bash", "env", "ip", "mount", "umount", "nsenter", "unshare", "hostname", "ssh", "sshd", "ssh-keygen", "pdsh")
"""What a host needs. Not every system has them: iproute2 has ip, openssh-server has sshd."""
USER = "researcher"
SWITCH = ("unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
"""Makes the namespaces of the cluster. The command that follows is root in them, and process 1."""
HOST = ("unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")
BOOT = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
echo 0 > /proc/sys/net/ipv4/ip_unprivileged_port_start  # sshd listens on port 22 without being root
exec unshare --user --map-user=1000 --map-group=1000 bash -c 'echo up; sleep infinity; exit'
"""
"""A host's process 1: prepares its namespaces, becomes an ordinary user, and collects the exit codes of orphans for ever."""
SSHD = """
HostKey {keys}/host
AuthorizedKeysFile {keys}/user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
SetEnv OMP_NUM_THREADS=1
AcceptEnv {mark}
"""
SSH = """
Host *
  IdentityFile {keys}/user
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  SendEnv {mark}
"""
SYSTEM_PATH = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin{os.pathsep}/sbin"


@functools.cache
def why_not() -> str | None:
    """Why hosts cannot be made here, as a reason for a skipped test; None if they can."""
    if sys.platform != "linux":
        return "there are no namespaces on this system"
    for name in PROGRAMS:
        if not shutil.which(name, path=SYSTEM_PATH):
            return f"there is no {name} → install it (Debian's packages are iproute2, openssh-server, pdsh)"
    tried = subprocess.run([*SWITCH, "ip", "link", "add", "cable", "type", "bridge"], capture_output=True, text=True, env=_environ())
    if tried.returncode:
        allow = "allow user namespaces (sysctl user.max_user_namespaces and, on Debian and Ubuntu, kernel.*unprivileged_userns*)"
        return f"namespaces with a network of their own cannot be made here ({tried.stderr.strip()}) → {allow}"
    return None


class Host:
    """One host that is up. Its processes are seen from outside, with the numbers that they have outside."""

    def __init__(self, cluster: "Cluster", name: str, address: str) -> None:
        self.cluster, self.name, self.address = cluster, name, address
        self.files = cluster.folder / name
        """The host's own files, as they are called outside."""
        (self.files / "home/.ssh").mkdir(parents=True)
        (self.files / "home/.ssh/config").write_text(SSH.format(keys=cluster.keys, mark=MARK))
        command = [*cluster.enter("--mount", "--pid"), *HOST, "bash", "-c", BOOT, name, name]
        self.process = _start_and_hear(command, "up")
        started = psutil.Process(self.process.pid).children(recursive=True)  # nsenter's child, this host's process 1, and its child
        self.init = next(process for process in started if _pid_namespace(process) != cluster.pid_namespace)
        self.pid_namespace = _pid_namespace(self.init)
        self.sshd: subprocess.Popen | None = None
        self._own_files = 0
        self._system: set[int] = set()

    def command(self, words: Iterable[str], cwd: Path) -> list[str]:
        """The command that runs `words` on this host, in the folder `cwd`. It keeps the environment that it is started with."""
        spaces = ("--mount", "--uts", "--ipc", "--net", "--pid", "--user")
        return [*self.cluster.enter(), *_nsenter(self.init.pid, *spaces), "env", f"--chdir={cwd}", *words]

    def popen(self, words: Iterable[str], cwd: Path, environ: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen:
        """Starts a command on this host, in a session of its own, in the environment of a new terminal."""
        environ = self.cluster.environ | dict(environ or {})
        options = {"stdin": subprocess.DEVNULL, "start_new_session": True, "text": True, **options}
        return subprocess.Popen(self.command(words, cwd), env=environ, **options)

    def run(self, *words: str, cwd: Path = Path("/"), environ: Mapping[str, str] | None = None, limit: float = LIMIT) -> str:
        """The standard output of a command on this host. Raises if it fails, or takes longer than `limit` seconds."""
        with self.popen(words, cwd, environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                out, err = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                raise
        assert process.returncode == 0, f"{words} on {self.name}: exit code {process.returncode}\n{out}\n{err}"
        return out

    def processes(self) -> list[psutil.Process]:
        """Every process of this host that is alive, except its process 1 with its child, and sshd's."""
        here = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                ours = _pid_namespace(process) == self.pid_namespace and process.status() != psutil.STATUS_ZOMBIE
                if ours and process.pid not in self._system and process.name() != "sshd":
                    here.append(process)
        return here

    def roles(self, launch: Launch) -> dict[str, psutil.Process]:
        """The living processes of the launch on this host, by role, as `Launch.roles` gives them."""
        roles = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == launch.mark:
                    roles[_role(process)] = process
        return roles

    def hide(self, folder: Path) -> Path:
        """From now on `folder` is on this host an empty folder of its own: a disk that is not shared. Returns its name outside."""
        self._own_files += 1
        own = self.files / f"{folder.name}_{self._own_files}"
        own.mkdir()
        folder.mkdir(parents=True, exist_ok=True)
        self._mount("mount", "--bind", str(own), str(folder))
        return own

    def replace(self, file: Path, content: str) -> None:
        """From now on `file`, which must exist, has this content on this host, and only here."""
        self._own_files += 1
        own = self.files / f"{self._own_files}_{file.name}"
        own.write_text(content)
        self._mount("mount", "--bind", str(own), str(file))

    def restore(self, path: Path) -> None:
        """Undoes the last `hide` or `replace` of this path."""
        self._mount("umount", str(path))

    def cut(self) -> None:
        """Pulls this host's cable: the link goes down at both ends, and no packet arrives. Its processes go on."""
        self.cluster.ip("link", "set", self.name, "down")

    def mend(self) -> None:
        """Plugs the cable in again."""
        self.cluster.ip("link", "set", self.name, "up")

    def kill(self, power: bool = True) -> None:
        """Ends every process of this host at once. `power`: as a power cut does, after which no packet tells the others."""
        if power:
            self.cut()
        self.init.kill()
        self.process.wait(30)

    def _boot(self, hosts: str) -> None:
        """Connects the cable, and gives the host its home, its users, its /etc/hosts, a boot id of its own, and an sshd."""
        end = str(self.init.pid)
        self.cluster.ip("link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", end)
        self.cluster.ip("link", "set", self.name, "master", "switch", "up")
        inside = [*self.cluster.enter(), *_nsenter(self.init.pid, "--net"), "ip"]
        _call([*inside, "address", "add", f"{self.address}/24", "dev", "eth0"])
        _call([*inside, "link", "set", "eth0", "up"])
        self._mount("mount", "--bind", str(self.files / "home"), str(self.cluster.place.home))
        self.replace(Path("/etc/hosts"), hosts)
        self.replace(Path("/etc/passwd"), f"{USER}:x:1000:1000::{self.cluster.place.home}:/bin/bash\n")
        self.replace(Path("/etc/nsswitch.conf"), "passwd: files\ngroup: files\nhosts: files\n")
        self.replace(Path("/proc/sys/kernel/random/boot_id"), f"00000000-0000-4000-8000-{int(self.address.split('.')[-1]):012d}\n")
        config = self.files / "sshd_config"
        config.write_text(SSHD.format(keys=self.cluster.keys, mark=MARK))
        with (self.files / "sshd.log").open("w") as log:
            sshd = shutil.which("sshd", path=SYSTEM_PATH)
            self.sshd = self.popen([str(sshd), "-D", "-e", "-f", str(config)], Path("/"), stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while "Server listening" not in (self.files / "sshd.log").read_text():
            assert self.sshd.poll() is None and time.monotonic() < deadline, (self.files / "sshd.log").read_text()
            time.sleep(0.02)
        self._system = {process.pid for process in self.processes()}

    def _mount(self, *words: str) -> None:
        _call([*self.cluster.enter(), *_nsenter(self.init.pid, "--mount", "--pid"), *words])  # umount reads /proc/self


class Cluster:
    """A context manager that makes hosts, named node1, node2 …, on which launches share the files of a place. See the module's text."""

    def __init__(self, place: Place, hosts: int = 2) -> None:
        self.place, self.folder = place, place.path / f"cluster_{time.monotonic_ns()}"
        self.keys = self.folder / "keys"
        self.environ = _environment(place) | {"OMP_NUM_THREADS": "1", "USER": USER}
        """The environment of a terminal on any host. One thread per rank, wherever it runs: other sums would be rounded differently."""
        self.names = [f"node{number}" for number in range(1, hosts + 1)]
        self.hosts: list[Host] = []

    def __enter__(self) -> Self:
        self.keys.mkdir(parents=True)
        for name in ("host", "user"):
            _call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.keys / name)])
        self.process = _start_and_hear([*SWITCH, "bash", "-c", "echo up; read -r"], "up", stdin=subprocess.PIPE)
        (self.init,) = psutil.Process(self.process.pid).children()
        self.pid_namespace = _pid_namespace(self.init)
        try:
            self.ip("link", "set", "lo", "up")
            self.ip("link", "add", "switch", "type", "bridge")
            self.ip("link", "set", "switch", "up")
            addresses = {name: f"10.77.0.{number}" for number, name in enumerate(self.names, 1)}
            hosts = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
            for name, address in addresses.items():
                self.hosts.append(Host(self, name, address))
                self.hosts[-1]._boot(hosts)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the cluster's process 1, and with it, in the kernel, every process of every host."""
        assert self.process.stdin
        self.process.stdin.close()
        for process in (self.process, *(process for host in self.hosts for process in (host.process, host.sshd) if process)):
            process.wait(30)
            for stream in (process.stdout, process.stderr):
                if stream:
                    stream.close()

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number]

    def enter(self, *spaces: str) -> list[str]:
        """The beginning of a command that is run as root of the cluster: outside, or in these of the cluster's namespaces."""
        return _nsenter(self.init.pid, "--user", *spaces)

    def ip(self, *words: str) -> None:
        """Runs `ip` in the switch's network."""
        _call([*self.enter("--net"), "ip", *words])

    def processes(self) -> list[psutil.Process]:
        """Every process of every host that is alive, except what belongs to the hosts themselves."""
        return [process for host in self.hosts for process in host.processes()]

    def wait_until_idle(self, limit: float) -> None:
        """Waits until no process of a launch is left on any host; fails with their names if some are."""
        deadline = time.monotonic() + limit
        while alive := self.processes():
            assert time.monotonic() < deadline, f"still running after {limit:.0f} s: {alive}"
            time.sleep(0.1)


def launch(
    cluster: Cluster,
    launcher: str,
    on: Sequence[int] | None = None,
    ranks: int = 1,
    only: Mapping[int, Mapping[str, Any]] | None = None,
    environ: Mapping[str, str] | None = None,
    experiment: str = "gpt_sotu",
    **changes: Any,
) -> Launch:
    """Starts `experiments/EXPERIMENT/launch.py` on several hosts as a user would: deepspeed on the first of them, torchrun on all.

    `on` are the numbers of the hosts, all by default; each has so many `ranks`. srun's tasks are started with its variables, as if it
    had been asked for all hosts of the cluster, with one rank each. `changes` are settings with __ for the dot, and `only` those of
    single hosts.
    """
    place, chosen = cluster.place, [*range(len(cluster.hosts))] if on is None else [*on]
    environs = [cluster.environ | dict(environ or {}) for _ in chosen]
    if launcher == "deepspeed":
        hostfile = cluster.folder / "hostfile"
        hostfile.write_text("".join(f"{cluster.names[number]} slots={ranks}\n" for number in chosen))
        before = [*_command("deepspeed", "deepspeed.launcher.runner"), "--hostfile", str(hostfile)]
        chosen = chosen[:1]
    elif launcher == "torchrun":
        meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{cluster.names[chosen[0]]}:29500"]
        sizes = ["--nnodes", str(len(chosen)), "--nproc_per_node", str(ranks)]
        before = [*_command("torchrun", "torch.distributed.run"), *sizes, *meeting]
    else:
        before = [sys.executable]
        environs = [environment | slurm(number, cluster.names) for number, environment in zip(chosen, environs, strict=True)]
    commands = []
    for number in chosen:
        settings = {name.replace("__", "."): value for name, value in (changes | dict((only or {}).get(number, {}))).items()}
        words = [*before, f"experiments/{experiment}/launch.py", *place.settings(settings)]
        commands.append(cluster[number].command(words, ROOT))
    return Launch(place, commands, Path("/"), environs[: len(commands)])


def slurm(rank: int, names: list[str]) -> dict[str, str]:
    """The environment variables that srun sets for a task of a step with one task on each of these nodes."""
    world, nodes = len(names), ",".join(names)
    counts = {"SLURM_NTASKS": str(world), "SLURM_NNODES": str(world), "SLURM_STEP_NUM_TASKS": str(world)}
    lists = {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": f"1(x{world})"}
    own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NODEID": str(rank)}
    return {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"} | counts | lists | own


def _pid_namespace(process: psutil.Process) -> str:
    return os.readlink(f"/proc/{process.pid}/ns/pid")


def _nsenter(pid: int, *spaces: str) -> list[str]:
    return [str(shutil.which("nsenter", path=SYSTEM_PATH)), "--preserve-credentials", f"--target={pid}", *spaces, "--"]


def _environ() -> dict[str, str]:
    """This process's environment, with the folders of the system's programs on the PATH."""
    return {**os.environ, "PATH": SYSTEM_PATH}


def _call(command: list[str]) -> None:
    """Runs a command of the harness's own; its error output is the error."""
    done = subprocess.run(command, capture_output=True, text=True, env=_environ())
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"


def _start_and_hear(command: list[str], word: str, **options: Any) -> subprocess.Popen:
    """Starts a command and waits until it writes a line with this word only."""
    options = {"stdin": subprocess.DEVNULL, "start_new_session": True, **options}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environ(), **options)
    assert process.stdout and process.stderr
    if process.stdout.readline() != f"{word}\n":
        process.kill()
        raise AssertionError(f"{command}: {process.stderr.read()}")
    return process
