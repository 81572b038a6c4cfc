"""Hosts are asked by ssh whether they answer, and for the processes of a launch. On two hosts in namespaces."""

import json
from typing import Any

import pytest

from research import ROOT
from research.cluster.remote import MARK
from tests.research.helpers.hosts import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.hosts]
ASKS = "import json, pathlib; from research.cluster.remote import Remote; remote = Remote(seconds=2); print(json.dumps({}))"


def asked(cluster: Cluster, expression: str) -> Any:
    """The value of an expression in `remote`, on the first host."""
    return json.loads(cluster[0].run("python", "-c", ASKS.format(expression), cwd=ROOT))


def test_who_answers(cluster: Cluster) -> None:
    question = f"remote.silent(['node1', 'node2', 'node3'], pathlib.Path({str(cluster.place.path)!r}))"
    silent = asked(cluster, question)
    assert list(silent) == ["node3"] and "node3" in silent["node3"]
    assert asked(cluster, "remote.silent(['node2'], pathlib.Path('/no/such folder'))") == {"node2": "it has no folder /no/such folder"}
    cluster[1].cut()
    silent = asked(cluster, question)
    assert sorted(silent) == ["node2", "node3"] and "timed out" in silent["node2"]
    cluster[1].mend()


def test_the_processes_of_one_launch_are_found_and_killed_and_no_others(cluster: Cluster) -> None:
    marks = {"a": 2, "ab": 1}
    sleeps = {mark: [cluster[1].popen(["sleep", "1000"], ROOT, {MARK: mark}) for _ in range(count)] for mark, count in marks.items()}
    while len(cluster[1].processes()) < 3:
        pass
    for mark, count in {**marks, "b": 0}.items():
        found = asked(cluster, f"remote.processes(['node1', 'node2', 'node3'], {mark!r})")
        assert {host: len(numbers) for host, numbers in found.items()} == {"node1": 0, "node2": count}
    asked(cluster, "remote.kill(['node1', 'node2'], 'a')")
    assert [process.wait(10) for process in sleeps["a"]] == [-9, -9]
    assert asked(cluster, "len(remote.processes(['node2'], 'a')['node2'])") == 0
    assert sleeps["ab"][0].poll() is None
    asked(cluster, "remote.kill(['node2'], 'ab')")
    assert sleeps["ab"][0].wait(10) == -9
