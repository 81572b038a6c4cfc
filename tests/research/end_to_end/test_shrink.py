"""`supervise deepspeed --hostfile` on two hosts: a host is lost in mid-run, and the run goes on with the other, and on both again later.

The losses of all steps are those of a run on the final layout that nobody disturbed, up to rounding.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from research import ROOT
from research.cluster.remote import MARK
from research.tracking import metrics
from research.tracking.run_folder import RunFolder, of_experiment
from tests.research.end_to_end.test_launchers import EQUAL
from tests.research.helpers.hosts import Cluster
from tests.research.helpers.launches import Ended, Launch, Place, run

pytestmark = [pytest.mark.slow, pytest.mark.hosts]
SETTINGS = {
    "schedule.steps": 60,
    "schedule.batch_size": 128,
    "schedule.validate_every": 0,
    "checkpoints.every": 5,
    "watch.hang_seconds": 10,
}
LIMIT = 300.0


@pytest.fixture(scope="module")
def whole(hosts_can_be_made: None, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The undisturbed run on one rank."""
    settings = {name.replace(".", "__"): value for name, value in SETTINGS.items()}
    ended = run(Place(tmp_path_factory.mktemp("whole")), "python", environ={"OMP_NUM_THREADS": "1"}, **settings)
    assert ended.code == 0, ended.err
    return ended


class Supervised:
    """`supervise` on the first host, over both."""

    def __init__(self, cluster: Cluster, *options: str, **changes: Any) -> None:
        self.cluster = cluster
        hostfile = cluster.folder / "hosts"
        hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
        settings = cluster.place.settings(SETTINGS | {name.replace("__", "."): value for name, value in changes.items()})
        launch = ["deepspeed", "--hostfile", str(hostfile), "experiments/gpt_sotu/launch.py", *settings]
        words = ["python", "-m", "research", "supervise", *options, *launch]
        self.launch = Launch(cluster.place, [cluster[0].command(words, ROOT)], Path("/"), [cluster.environ])

    def __enter__(self) -> "Supervised":
        return self

    def __exit__(self, *_: object) -> None:
        self.launch.kill()

    @property
    def folder(self) -> RunFolder:
        (folder,) = of_experiment(self.cluster.place.runs / "gpt_sotu")
        return folder

    def come_to(self, step: int, segment: int = 1) -> None:
        """Waits until the run has come to the step, in a segment of this number or a later one."""

        def reached() -> bool:
            assert self.launch.processes[0].poll() is None, self.said
            folders = of_experiment(self.cluster.place.runs / "gpt_sotu")
            if not folders or len(json.loads(folders[0].run.read_text()).get("segments", [0])) < segment:
                return False
            return any(row["progress/step"] >= step for row in metrics.read(folders[0].metrics))

        self.until(reached)

    def until(self, happened: Callable[[], Any]) -> None:
        deadline = time.monotonic() + LIMIT
        while not happened():
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    @property
    def said(self) -> str:
        return self.launch.said() + self.launch.said("err")

    @property
    def lines(self) -> list[str]:
        return [line.removeprefix("supervise  ") for line in self.launch.said("err").splitlines() if line.startswith("supervise  ")]

    def ranks(self) -> dict[str, list[int]]:
        """The processes of launches by host, as `supervise` marks them."""
        found: dict[str, list[int]] = {host.name: [] for host in self.cluster.hosts}
        for host in self.cluster.hosts:
            for process in host.processes() if host.process.poll() is None else ():
                if MARK in process.environ() and any(word.endswith("/launch.py") for word in process.cmdline()):
                    found[host.name].append(process.pid)
        return found


@pytest.fixture
def supervised(cluster: Cluster) -> Iterator[Callable[..., Supervised]]:
    begun: list[Supervised] = []

    def start(*options: str, **changes: Any) -> Supervised:
        begun.append(Supervised(cluster, *options, **changes))
        return begun[-1]

    yield start
    for each in begun:
        each.launch.kill()


def assert_whole(folder: RunFolder, whole: Ended) -> None:
    """All rows, each once, with the losses of the undisturbed run."""
    rows = [row for row in metrics.read(folder.metrics) if "train/loss" in row]
    assert [row["progress/step"] for row in rows] == [*range(1, 61)]
    assert [row["train/loss"] for row in rows] == pytest.approx(whole.column("train/loss"), rel=EQUAL)
    assert json.loads(folder.run.read_text())["status"] == "finished"


def test_a_host_dies_and_the_run_goes_on_with_the_other(cluster: Cluster, supervised: Callable[..., Supervised], whole: Ended) -> None:
    launched = supervised("--shrink")
    launched.come_to(12)
    cluster[1].kill()
    assert launched.launch.processes[0].wait(LIMIT) == 0, launched.said
    (chosen,) = [line for line in launched.lines if "hosts, data" in line]
    assert chosen.startswith("2 → 1 hosts, data 2 → 1: 128 sequences = 2 micro × 64 accumulated × 1 data; no answer from node2 (")
    assert json.loads(launched.folder.run.read_text())["layout"] == "pipe 1 × data 1 × tensor 1 · ZeRO-1"
    assert_whole(launched.folder, whole)
    cluster.wait_until_idle(30)


def test_a_host_that_answers_again_is_used_again(cluster: Cluster, supervised: Callable[..., Supervised], whole: Ended) -> None:
    """Its cable is cut and mended. A rank that is killed then makes `supervise` launch again, on both."""
    launched = supervised("--shrink")
    launched.come_to(12)
    cluster[1].cut()
    launched.come_to(20, segment=2)
    cluster[1].mend()
    ranks = launched.ranks()
    assert len(ranks["node1"]) >= 1 and not ranks["node2"], "a rank of the first launch is left beside the second launch"
    [process.send_signal(signal.SIGKILL) for process in cluster[0].processes() if process.pid == max(ranks["node1"])]
    assert launched.launch.processes[0].wait(LIMIT) == 0, launched.said
    chosen = [line.partition(":")[0] for line in launched.lines if "hosts, data" in line]
    assert chosen == ["2 → 1 hosts, data 2 → 1", "1 → 2 hosts, data 1 → 2"]
    assert_whole(launched.folder, whole)


def test_without_shrink_it_waits_for_the_host(cluster: Cluster, supervised: Callable[..., Supervised], whole: Ended) -> None:
    launched = supervised()
    launched.come_to(12)
    cluster[1].cut()
    launched.until(lambda: any(line.startswith("waits for hosts: 1 of 2 answer; node2 (") for line in launched.lines))
    cluster[1].mend()
    assert launched.launch.processes[0].wait(LIMIT) == 0, launched.said
    assert not [line for line in launched.lines if "hosts, data" in line]
    assert_whole(launched.folder, whole)


def test_a_host_that_does_not_answer_at_the_start_is_named(cluster: Cluster, supervised: Callable[..., Supervised]) -> None:
    cluster[1].kill()
    launched = supervised()
    assert launched.launch.processes[0].wait(LIMIT) == 2
    assert "\nerror  no answer from node2 (" in "\n" + launched.launch.said("err") and "→ check `ssh HOST true`" in launched.said
    assert not cluster.place.runs.exists()


def test_a_signal_ends_the_ranks_of_all_hosts(cluster: Cluster, supervised: Callable[..., Supervised]) -> None:
    """SIGTERM to `supervise` alone: both hosts' ranks save and end, and nothing is launched again."""
    launched = supervised("--shrink")
    launched.come_to(12)
    (supervise,) = [process for process in cluster[0].processes() if "supervise" in process.cmdline() and "research" in process.cmdline()]
    supervise.send_signal(signal.SIGTERM)
    assert launched.launch.processes[0].wait(LIMIT) == 143, launched.said
    assert not any(launched.ranks().values())
    run = json.loads(launched.folder.run.read_text())
    assert run["status"] == "interrupted" and len(run.get("segments", [run])) == 1, run
