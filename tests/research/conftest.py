"""Launches the same tiny experiment once through every launcher, for all tests: each launch costs ten to twenty seconds of imports."""

import pytest

from research.tracking.run_folder import RunFolder
from tests.models.helpers.build import ROTARY
from tests.research.helpers import untrained
from tests.research.helpers.launches import Ended, Place, launch, run
from tests.research.helpers.smollm2 import smollm2

__all__ = ["smollm2"]

NOWHERE = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4}
"""A W&B server that does not exist, and a key without an account."""

LONG_CONTEXT = ROTARY | dict(seq_length=128, num_kv_heads=2)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("launches"))


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory):
    """A working directory outside the repository."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="session")
def alone(place: Place) -> Ended:
    """One rank by plain python, from the repository, with a W&B server that does not answer."""
    return run(place, "python", environ=NOWHERE, track__mode="auto")


@pytest.fixture(scope="session")
def by_launcher(place: Place, alone: Ended, elsewhere) -> dict[str, Ended]:
    """Two ranks by deepspeed, torchrun and srun, side by side: for a third of its time a launch uses one core only.

    They start after `alone`, which prepares the text that all launches share, and whose W&B has time limits.
    """
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
def small(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that was never trained, with rotary positions, so that its context may be of any length."""
    return untrained.make(tmp_path_factory.mktemp("serving"), **LONG_CONTEXT)
