"""One small untrained run for all tests of the server."""

import pytest

from research.run_folder import RunFolder
from tests.models.build import ROTARY
from tests.research import untrained

LONG = ROTARY | dict(seq_length=128, num_kv_heads=2)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Rotary positions: its context may be as long as a test likes."""
    return untrained.make(tmp_path_factory.mktemp("serving"), **LONG)
