"""The same tiny experiment through every launcher, once for all tests: each launch costs ten to twenty seconds of imports."""

import pytest

from research.tracking.run_folder import RunFolder
from tests.models.helpers.build import ROTARY
from tests.research.helpers import untrained
from tests.research.helpers.launches import Ended, Place, launch, run
from tests.research.helpers.smollm2 import smollm2

__all__ = ["smollm2"]

NOWHERE = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4}
"""A W&B server that nobody can reach and a key that nobody was given."""

LONG_CONTEXT = ROTARY | dict(seq_length=128, num_kv_heads=2)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("launches"))


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory):
    """A working directory that has nothing to do with the repository."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="session")
def alone(place: Place) -> Ended:
    """One rank, plain python, from the repository, W&B wanted but unreachable."""
    return run(place, "python", environ=NOWHERE, track__mode="auto")


@pytest.fixture(scope="session")
def tensor_2(place: Place, alone: Ended, elsewhere) -> Ended:
    """Two tensor ranks by deepspeed, from elsewhere."""
    return run(place, "deepspeed", 2, cwd=elsewhere, parallel__tensor=2)


@pytest.fixture(scope="session")
def pipe_2(place: Place, alone: Ended, elsewhere) -> Ended:
    """Two stages by torchrun, from elsewhere."""
    return run(place, "torchrun", 2, cwd=elsewhere, parallel__pipe=2)


@pytest.fixture(scope="session")
def data_2(place: Place, alone: Ended) -> Ended:
    """Two data ranks as srun starts them, from the repository."""
    return run(place, "srun", 2)


@pytest.fixture
def launched(place: Place):
    """`launch` whose processes are gone when the test is over, however it ends."""
    begun = []

    def begin(*arguments, **settings):
        begun.append(launch(place, *arguments, **settings))
        return begun[-1]

    yield begin
    for each in begun:
        each.kill()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Rotary positions: its context may be as long as a test likes."""
    return untrained.make(tmp_path_factory.mktemp("serving"), **LONG_CONTEXT)
