"""Runs a function on n real ranks and returns its results: research/cluster/forked_ranks.py, for tests."""

import functools
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from research import ROOT
from research.cluster import forked_ranks
from research.cluster.environment import environment
from research.cluster.forked_ranks import CPU, PRELOAD

MORE = (
    *("torch._subclasses.schema_check_mode", "pytest", "tests.harness", "research.verification.training"),
    *("matplotlib.backends.backend_agg", "matplotlib.figure"),  # every run draws its loss: a second per small run
)
"""What tests need beside PRELOAD."""
SERVER_ENVIRONMENT = {**CPU, "PYTHONPATH": str(ROOT)}
"""The environment of the server and of every rank, which may be started from any folder."""


class RankFailed(AssertionError):
    """One or more ranks raised, died or hung. The message holds the traceback of each."""


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """`function(*arguments)` on `world` ranks with torch.distributed up; the results in rank order.

    `function` and its results must pickle (a module-level function; numbers, tensors, dicts of them). No rank outlives the call:
    after the first failure, or after `timeout` seconds, the others are killed. No rank outlives its caller either.
    """
    start_server()
    with tempfile.TemporaryDirectory() as folder:
        try:
            forked_ranks.run(functools.partial(_write_result, function, arguments), world, Path(folder), timeout)
        except forked_ranks.RankFailed as failure:
            raise RankFailed(str(failure)) from None
        return [pickle.loads((Path(folder) / f"result_{rank}").read_bytes()) for rank in range(world)]


def start_server(*preload: str) -> None:
    """Start the process that ranks are forked from; `preload`: other modules than the usual ones. Does nothing if it already runs."""
    with environment({"PYTHONPATH": str(ROOT)}):
        forked_ranks.start_server(preload or (*PRELOAD, *MORE))


def _write_result(function: Callable[..., Any], arguments: tuple, folder: Path) -> None:
    result = pickle.dumps(function(*arguments))  # plain: torch's own reducer would make handles of tensors, gone with this process
    (folder / f"result_{dist.get_rank()}").write_bytes(result)
    deadline = time.monotonic() + 0.5  # a rank that left at once would close connections that another may still be making
    while len([*folder.glob("result_*"), *folder.glob("traceback_*")]) < dist.get_world_size() and time.monotonic() < deadline:
        time.sleep(0.005)
