"""A run on two hosts equals the run of the same layout on one host to the last bit of every loss and every weight, with every launcher."""

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.checkpoint.folder import latest
from parallel.checkpoint.reader import Reader
from tests.research.helpers import hosts
from tests.research.helpers.hosts import Cluster
from tests.research.helpers.launches import Ended, Place, launch

pytestmark = [pytest.mark.slow, pytest.mark.hosts]
SETTINGS = {"schedule__steps": 12, "schedule__validate_every": 6}
LAYOUTS: dict[str, dict[str, Any]] = {
    "deepspeed": {"parallel__tensor": 2},
    "torchrun": {"parallel__pipe": 2},
    "srun": {"parallel__zero_stage": 2},
}
"""Each launcher has a layout of its own, so that all that ranks say to each other crosses the cable once."""


@pytest.fixture(scope="module")
def one_host(hosts_can_be_made: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Launcher -> the run of its layout on this machine, on two ranks with one thread each, as on the two hosts."""
    place = Place(tmp_path_factory.mktemp("one_host"))
    begun = {name: launch(place, name, 2, environ={"OMP_NUM_THREADS": "1"}, **SETTINGS, **LAYOUTS[name]) for name in LAYOUTS}
    try:
        return {name: each.wait() for name, each in begun.items()}
    finally:
        for each in begun.values():
            each.kill()


def everything(ended: Ended) -> dict[str, list[str]]:
    """All numbers of the run that do not depend on the clock, and the weights and moments of its last checkpoint, as text."""
    keys = ("train/loss", "train/grad_norm", "train/lr", "val/loss", "val/bits_per_byte")
    numbers = {key: [float(value).hex() for value in ended.column(key)] for key in keys}
    with Reader(latest(ended.folder.checkpoints)) as reader:
        for kind, tensors in reader.manifest.tensors.items():
            for name in tensors:
                numbers[f"{kind} of {name}"] = [reader.read(name, kind).to(torch.float64).numpy().tobytes().hex()]
    return numbers


def assert_equal(found: Ended, expected: Ended) -> None:
    assert (found.code, expected.code) == (0, 0), found.err + expected.err
    assert found.status == "finished"
    first, second = everything(found), everything(expected)
    assert len(first["train/loss"]) == 12 and len(first["val/loss"]) == 2 and len(first) > 40
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert found.column("train/loss")[-1] < found.column("train/loss")[0] - 0.1, "it learns nothing, so equality says nothing"


def header(ended: Ended, key: str) -> str:
    """A line of the run's header. pdsh writes the host's name before every line."""
    (line,) = [line.removeprefix("node1: ") for line in ended.out.splitlines() if line.removeprefix("node1: ").startswith(f"{key} ")]
    return line


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "srun"])
def test_two_hosts_equal_one(launcher: str, cluster: Cluster, one_host: dict[str, Ended]) -> None:
    """With a shared disk."""
    ended = hosts.launch(cluster, launcher, **SETTINGS, **LAYOUTS[launcher]).wait()
    cluster.wait_until_idle(30)
    assert_equal(ended, one_host[launcher])
    assert header(ended, "machine").startswith("machine  2 nodes × 1 rank · cpu")
    assert "Traceback" not in ended.err


def test_only_runs_must_be_on_a_shared_disk(cluster: Cluster, one_host: dict[str, Ended]) -> None:
    """Each host has a text, a cache and a home of its own."""
    place = cluster.place
    for file in (place.train, place.validation):
        cluster[1].replace(file, file.read_text())
    own = cluster[1].hide(place.path / "cache")
    ended = hosts.launch(cluster, "srun", **SETTINGS, **LAYOUTS["srun"]).wait()
    cluster.wait_until_idle(30)
    assert_equal(ended, one_host["srun"])
    assert names(own) == names(place.path / "cache") != []


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".bin", ".idx"))
