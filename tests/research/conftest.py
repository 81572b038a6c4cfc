"""Launches the same tiny experiment once through every launcher, for all tests: each launch costs ten to twenty seconds of imports."""

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from parallel.files import locked
from research.tracking.run_folder import RunFolder
from tests.models.helpers.build import ROTARY
from tests.research.helpers import untrained
from tests.research.helpers.hosts import Cluster, why_not
from tests.research.helpers.launches import Ended, Place, launch, run
from tests.research.helpers.smollm2 import smollm2

__all__ = ["smollm2"]

NOWHERE = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4}
"""A W&B server that does not exist, and a key without an account."""

LONG_CONTEXT = ROTARY | dict(seq_length=128, num_kv_heads=2)


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the whole session, also where pytest-xdist divides it among several workers."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def place(session_folder: Path) -> Place:
    with locked(session_folder / "launches.lock"):
        return Place(session_folder / "launches")


def once(place: Place, name: str, launches: Callable[[], Any]) -> Any:
    """What `launches` returns; the first worker that asks for it carries it out, the others wait and read the result."""
    kept = place.path / f"{name}.pickle"
    with locked(place.path / f"{name}.lock"):
        if not kept.is_file():
            kept.write_bytes(pickle.dumps(launches()))
        return pickle.loads(kept.read_bytes())


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory):
    """A working directory outside the repository."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="session")
def alone(place: Place) -> Ended:
    """One rank by plain python, from the repository, with a W&B server that does not answer."""
    return once(place, "alone", lambda: run(place, "python", environ=NOWHERE, track__mode="auto"))


@pytest.fixture(scope="session")
def by_launcher(place: Place, alone: Ended, elsewhere) -> dict[str, Ended]:
    """Two ranks by deepspeed, torchrun and srun, side by side: for a third of its time a launch uses one core only.

    They start after `alone`, which prepares the text that all launches share, and whose W&B has time limits.
    """

    def side_by_side() -> dict[str, Ended]:
        launches = {
            "deepspeed": launch(place, "deepspeed", 2, cwd=elsewhere, parallel__tensor=2),
            "torchrun": launch(place, "torchrun", 2, cwd=elsewhere, parallel__pipe=2),
            "srun": launch(place, "srun", 2),
        }
        try:
            return {launcher: begun.wait() for launcher, begun in launches.items()}
        finally:
            for begun in launches.values():
                begun.kill()

    return once(place, "by_launcher", side_by_side)


@pytest.fixture(scope="session")
def tensor_2(by_launcher: dict[str, Ended]) -> Ended:
    """Two tensor ranks by deepspeed, from outside the repository."""
    return by_launcher["deepspeed"]


@pytest.fixture(scope="session")
def pipe_2(by_launcher: dict[str, Ended]) -> Ended:
    """Two stages by torchrun, from outside the repository."""
    return by_launcher["torchrun"]


@pytest.fixture(scope="session")
def data_2(by_launcher: dict[str, Ended]) -> Ended:
    """Two data ranks as srun starts them, from the repository."""
    return by_launcher["srun"]


@pytest.fixture
def launched(place: Place):
    """`launch`, whose processes are killed when the test is over, however it ends."""
    begun = []

    def begin(*arguments, **settings):
        begun.append(launch(place, *arguments, **settings))
        return begun[-1]

    yield begin
    for each in begun:
        each.kill()


@pytest.fixture(scope="session")
def hosts_can_be_made() -> None:
    """Skips the test, with the reason, where hosts cannot be made."""
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def cluster(hosts_can_be_made: None, tmp_path: Path) -> Iterator[Cluster]:
    """Two hosts with a shared disk."""
    with Cluster(Place(tmp_path)) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that was never trained, with rotary positions, so that its context may be of any length."""
    return untrained.make(tmp_path_factory.mktemp("serving"), **LONG_CONTEXT)
