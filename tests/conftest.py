"""What all tests share: the time that a four-rank engine test takes is measured, and told at the end of every run of them."""

import statistics
import time

import pytest
import torch

from tests.harness import run_ranks, start_server

SECONDS = pytest.StashKey[list[float]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SECONDS] = []
    torch.set_num_threads(1)  # the models are so small that a second thread only waits: up to 40 times slower on shared cores


@pytest.fixture
def timed_run_ranks(request: pytest.FixtureRequest):
    """run_ranks, its wall time recorded; the server that ranks are forked from runs already."""

    def timed(*arguments):
        start_server()
        run_ranks(int, 1)  # the server answers when it has imported everything
        start = time.perf_counter()
        results = run_ranks(*arguments)
        request.config.stash[SECONDS].append(time.perf_counter() - start)
        return results

    return timed


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if seconds := config.stash[SECONDS]:
        median = statistics.median(seconds)
        terminalreporter.write_line(f"harness: 4-rank engine test (init, build, one step) median {median:.1f} s over {len(seconds)}")
