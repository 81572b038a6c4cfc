"""What goes wrong on a cluster, on two hosts: the run ends on both, says in one sentence why, and leaves no process.

Every error is one sentence from one rank, without a traceback; what the survivors have saved goes on where the hosts allow it.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parallel.checkpoint.folder import latest, newest_complete, step_of
from parallel.files import read_json
from research import ROOT
from research.reliability.parents import LAUNCHER_GONE
from research.tracking import metrics
from research.tracking.run_folder import RunFolder
from tests.research.helpers import hosts
from tests.research.helpers.hosts import Cluster
from tests.research.helpers.launches import Ended, Launch, Place, run

pytestmark = [pytest.mark.slow, pytest.mark.hosts]
LONG = {"schedule__steps": 100_000, "schedule__validate_every": 0, "schedule__log_every": 1}
STEPS = {"schedule__steps": 300, "schedule__validate_every": 0, "schedule__log_every": 1, "checkpoints__every": 2}
GONE = 90.0
"""Seconds within which no process may be left on any host, on a busy machine."""
HANG = 10
"""watch.hang_seconds of runs that are to hang."""


def until(condition: Callable[[], Any], limit: float = 120.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def come_to_step(begun: Launch, step: int) -> RunFolder:
    """Waits until this step of the launch's run is in its record; returns the run's folder."""

    def reached() -> list[RunFolder]:
        assert any(process.poll() is None for process in begun.processes), begun.said() + begun.said("err")
        folders = [RunFolder(path.parent) for path in begun.place.runs.glob("*/*/run.json") if path not in begun.before]
        return [folder for folder in folders if any(row["progress/step"] >= step for row in metrics.read(folder.metrics))]

    until(reached)
    return reached()[0]


def gone(cluster: Cluster, begun: Launch) -> Ended:
    """Waits until no process is left on any host that is up."""
    cluster.wait_until_idle(GONE)
    return begun.wait()


def state(folder: RunFolder) -> tuple[str, str]:
    """The status and the reason in run.json."""
    run = read_json(folder.run)
    return run["status"], run.get("reason", "")


def errors(ended: Ended) -> list[str]:
    """The lines that begin with 'error', without the name that pdsh writes before them."""
    lines = [re.sub(r"^node\d: ", "", line) for line in ended.err.splitlines()]
    return [line for line in lines if line.startswith("error ")]


def the_error(ended: Ended) -> str:
    """The one error that the launch ended with."""
    assert "Traceback" not in ended.err, ended.err
    (line,) = errors(ended)
    return line


def refused(cluster: Cluster, launcher: str = "srun", **settings: Any) -> str:
    """The error of a launch that no rank may begin: all end with code 2, and no run is left."""
    begun = hosts.launch(cluster, launcher, **settings)
    ended = begun.wait()
    cluster.wait_until_idle(GONE)
    assert {process.returncode for process in begun.processes} == {2}, ended.err
    assert ended.run is None and not [*cluster.place.runs.glob("*/*")]
    return the_error(ended)


# What is different on one of the hosts


def changed(file: Path, old: str, new: str) -> str:
    text = file.read_text("utf-8")
    assert old in text
    return text.replace(old, new)


def test_a_runs_folder_that_is_not_shared(cluster: Cluster) -> None:
    """The likeliest first mistake on a cluster, by the launcher that starts both hosts from one terminal."""
    cluster[1].hide(cluster.place.runs)
    said = refused(cluster, "deepspeed")
    assert "track.runs" in said and "node2" in said and "→" in said


def test_code_that_differs_where_git_cannot_tell(cluster: Cluster) -> None:
    file = ROOT / "models/mlp.py"
    cluster[1].replace(file, changed(file, "F.gelu(", "F.relu("))
    for host in cluster.hosts:
        host.hide(ROOT / ".git") if (ROOT / ".git").is_dir() else host.replace(ROOT / ".git", "")
    said = refused(cluster)
    assert "models/mlp.py" in said and "rank 1" in said and "node2" in said


def test_settings_that_differ(cluster: Cluster) -> None:
    """With another number of layers the ranks would wait for each other in vain."""
    said = refused(cluster, only={1: {"model__num_layers": 3}})
    assert "model.num_layers = 3" in said and "rank 1" in said and "node2" in said


def test_a_text_that_differs(cluster: Cluster) -> None:
    place = cluster.place
    cluster[1].replace(place.train, place.train.read_text().replace("peace", "power", 1))
    cluster[1].hide(place.path / "cache")
    said = refused(cluster)
    assert "rank 1 on node2 has the text of data.train = SHA-256 " in said


def test_a_text_that_one_host_lacks(cluster: Cluster) -> None:
    """The rank that lacks it says so, and the other ends with it."""
    begun = time.monotonic()
    said = refused(cluster, only={1: {"data__train": cluster.place.path / "nothing.txt"}})
    assert "nothing.txt" in said and "rank 1" in said
    assert time.monotonic() - begun < 120


# What is wrong with the network


def test_a_host_that_never_comes(cluster: Cluster) -> None:
    """Its task was not started: the others say who is missing, within watch.rendezvous_seconds."""
    begun = hosts.launch(cluster, "srun", on=[0], watch__rendezvous_seconds=10)
    ended = gone(cluster, begun)
    said = the_error(ended)
    assert ended.run is None and ended.code == 124
    assert "rank 1" in said and "node2" in said and "10 s" in said


def test_a_name_that_leads_each_host_to_itself(cluster: Cluster) -> None:
    """As Debian's installer writes it. The error names the variable that helps, and it does."""
    for host in cluster.hosts:
        others = "".join(f"{other.address} {other.name}\n" for other in cluster.hosts if other is not host)
        host.replace(Path("/etc/hosts"), f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{others}")
    begun = hosts.launch(cluster, "srun", environ={"MASTER_ADDR": cluster[0].address})
    ended = gone(cluster, begun)
    said = the_error(ended)
    assert ended.code == 2 and "127.0.1.1" in said and "GLOO_SOCKET_IFNAME" in said
    helped = hosts.launch(cluster, "srun", environ={"MASTER_ADDR": cluster[0].address, "GLOO_SOCKET_IFNAME": "eth0"}).wait()
    assert helped.code == 0 and helped.status == "finished", helped.err


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "deepspeed"])
def test_a_cable_is_cut(launcher: str, cluster: Cluster) -> None:
    """The ranks of both hosts leave. ssh, as the deepspeed command uses it, notices a lost host only if it is told to ask for it."""
    with (cluster[0].files / "home/.ssh/config").open("a") as config:
        config.write("  ServerAliveInterval 5\n  ServerAliveCountMax 3\n")
    begun = hosts.launch(cluster, launcher, watch__hang_seconds=HANG, **LONG)
    folder = come_to_step(begun, 3)
    cluster[1].cut()
    until(lambda: not any(role.startswith("rank") for host in cluster.hosts for role in host.roles(begun)), GONE)
    if launcher == "torchrun":  # its process on the host that is cut off asks the other host for minutes yet
        until(lambda: not cluster[0].processes(), GONE)
        cluster[1].mend()
    ended = gone(cluster, begun)
    status, reason = state(folder)
    assert status == "failed" and reason.startswith("no progress for 1")
    assert [line for line in errors(ended) if line.startswith(f"error  {reason}")]
    assert "/research/training/" not in ended.err, "a traceback of ours"
    if launcher == "srun":
        assert [process.returncode for process in begun.processes] == [124, 124]
    else:
        assert ended.code != 0


# What is killed


@pytest.fixture(scope="module")
def whole(hosts_can_be_made: None, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The uninterrupted run on two ranks of one host."""
    ended = run(Place(tmp_path_factory.mktemp("whole")), "srun", 2, environ={"OMP_NUM_THREADS": "1"}, **STEPS)
    assert ended.code == 0, ended.err
    return ended


def losses(folder: RunFolder) -> list[tuple[int, str]]:
    return [(row["progress/step"], row["train/loss"].hex()) for row in metrics.read(folder.metrics) if "train/loss" in row]


def killed(cluster: Cluster, victim: int, kill: Callable[[Launch], object], hang_seconds: float = HANG) -> RunFolder:
    """A run of which one host's rank was killed, at its sixth step or later. The other one says so, and has left."""
    begun = hosts.launch(cluster, "srun", watch__hang_seconds=hang_seconds, **STEPS)
    folder = come_to_step(begun, 6)
    kill(begun)
    ended = gone(cluster, begun)
    status, reason = state(folder)
    assert status == "failed" and f"rank {victim} (process " in reason and f" on node{victim + 1})" in reason
    assert the_error(ended).startswith(f"error  {reason} → ")
    return folder


def test_a_rank_of_the_other_host_is_killed(cluster: Cluster) -> None:
    """Its connections are closed, so the other rank fails at once, and finds out why long before hang_seconds. Rank 1 reports here."""
    folder = killed(cluster, 0, lambda begun: cluster[0].roles(begun)["rank 0"].kill(), hang_seconds=600)
    assert "is gone without a word, last seen" in state(folder)[1]


def test_all_processes_of_a_host_are_killed(cluster: Cluster) -> None:
    """As at a reboot: the network of the host goes with them."""
    killed(cluster, 0, lambda begun: cluster[0].kill(power=False))


def test_the_power_of_a_host_fails_and_the_run_goes_on_without_it(cluster: Cluster, whole: Ended) -> None:
    """No connection is closed. On the host that is left, two ranks lose no step, and their losses are those of the whole run."""
    folder = killed(cluster, 1, lambda begun: cluster[1].kill())
    saved = newest_complete(folder.checkpoints)
    assert saved is not None and 4 <= step_of(saved) < 300
    resumed = hosts.launch(cluster, "torchrun", on=[0], ranks=2, resume="auto", **STEPS).wait()
    assert resumed.code == 0 and state(folder)[0] == "finished", resumed.err
    assert losses(folder) == losses(whole.folder)
    assert step_of(latest(folder.checkpoints)) == 300


@pytest.mark.parametrize("names", [("command", "pdsh", "ssh"), ("ssh",)], ids=["deepspeed and pdsh and ssh", "ssh"])
def test_the_launcher_is_killed(names: tuple[str, ...], cluster: Cluster) -> None:
    """deepspeed, pdsh and both ssh at once, as the out-of-memory killer or a closed laptop does; or ssh alone."""
    begun = hosts.launch(cluster, "deepspeed", **LONG)
    folder = come_to_step(begun, 3)
    launchers = [process for process in cluster[0].processes() if _is_launcher(process, names)]
    assert len(launchers) == (4 if "pdsh" in names else 2), launchers
    for process in launchers:
        process.kill()
    ended = gone(cluster, begun)
    assert state(folder) == ("interrupted", LAUNCHER_GONE), ended.err
    assert step_of(latest(folder.checkpoints)) >= 3


def _is_launcher(process: Any, names: tuple[str, ...]) -> bool:
    words = process.cmdline()
    name = (
        "command"
        if any(word.endswith(("/deepspeed", "deepspeed.launcher.runner")) for word in words[:3])
        else process.name().removesuffix(".bin")
    )
    return name in names


# Two that want one run (more of them in test_one_writer.py)


def test_a_run_that_is_running_elsewhere_is_not_resumed(cluster: Cluster) -> None:
    """The second launch, on the other host, is refused with the holder's name, and the first one loses no row."""
    first = hosts.launch(cluster, "torchrun", on=[0], ranks=1, **LONG)
    folder = come_to_step(first, 3)
    second = hosts.launch(cluster, "torchrun", on=[1], ranks=1, resume="auto", **LONG)
    refusal = second.wait()
    assert refusal.code != 0
    (line,) = errors(refusal)
    assert "node1" in line and "is running" in line
    before = len(losses(folder))
    until(lambda: len(losses(folder)) > before + 3)
    assert [step for step, _ in losses(folder)] == [*range(1, len(losses(folder)) + 1)]
    assert read_json(folder.run)["status"] == "running"
    first.kill()
