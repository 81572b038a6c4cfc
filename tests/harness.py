"""Runs a function on n real ranks and returns its results: research/cluster/forked_ranks.py, for tests."""

import functools
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel import distributed
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


def run_on_gpu(function: Callable[..., Any], *arguments: Any, timeout: float = 300.0) -> Any:
    """`function(*arguments)` as the only rank of a world, in a new process that sees the GPUs which `run_ranks` hides; its result.

    For tests with the marker `gpu`. Where there is no GPU, it runs on the CPU. The process is killed after `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("spawn").Process(target=_only_rank, args=(function, arguments, Path(folder)))
        process.start()
        process.join(timeout)
        code = process.exitcode
        forked_ranks.end([process])
        traceback_file, result = Path(folder) / "traceback", Path(folder) / "result_0"
        if code != 0:
            raise RankFailed(traceback_file.read_text() if traceback_file.is_file() else f"exit code {code} within {timeout:.0f} s")
        return pickle.loads(result.read_bytes())


def _only_rank(function: Callable[..., Any], arguments: tuple, folder: Path) -> None:
    try:
        distributed.start(0, 1, 0, None)
        _write_result(function, arguments, folder)
        distributed.stop()
    except BaseException:
        (folder / "traceback").write_text(traceback.format_exc())
        raise


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
