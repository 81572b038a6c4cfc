"""Tensor ranks that `generate` starts end with it, and it with them, however either ends."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from parallel.grid import Grid
from research.cluster import tensor_ranks
from research.generation.restore import DecoderSpec
from research.tracking.run_folder import RunFolder
from tests.research.helpers import untrained
from tests.research.helpers.example import sentence
from tests.research.helpers.launches import ROOT

LIMIT = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> RunFolder:
    return untrained.make(tmp_path_factory.mktemp("ranks"))


def plan(folder: RunFolder) -> DecoderSpec:
    return DecoderSpec(folder.path, folder.checkpoints / "step_000003", slots=2, context=16)


def others() -> list[psutil.Process]:
    """Processes that `opened` has started and that are alive."""
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def test_one_rank_is_this_process(folder):
    with tensor_ranks.opened(plan(folder), 1) as decoder:
        assert decoder.grid == Grid() and others() == []


def test_other_ranks_are_gone_afterwards_and_after_an_error(folder):
    with tensor_ranks.opened(plan(folder), 2) as decoder:
        assert decoder.admit([[1, 2]]).shape == (1, 391) and len(others()) == 1
    assert others() == []
    with pytest.raises(ZeroDivisionError), tensor_ranks.opened(plan(folder), 2):
        raise ZeroDivisionError
    assert others() == []


def test_what_every_rank_refuses_is_said_once_and_at_once(folder):
    began = time.monotonic()
    damaged = DecoderSpec(folder.path, folder.checkpoints / "step_000004")

    def open_it():
        with tensor_ranks.opened(damaged, 2):
            raise AssertionError("it was opened")

    assert "is not a checkpoint" in sentence(open_it)
    assert others() == [] and time.monotonic() - began < LIMIT


@contextlib.contextmanager
def conversation(folder: RunFolder) -> Iterator[tuple[subprocess.Popen, psutil.Process]]:
    """A conversation on two ranks that waits for a prompt, and its other rank."""
    command = [sys.executable, "-m", "research", "generate", str(folder.path), "--interactive", "--tensor", "2", "--max_new_tokens", "3"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"war\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith(b"war")
        (other,) = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
        yield process, other
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_command(folder):
    with conversation(folder) as (process, other):
        other.kill()
        assert process.wait(LIMIT) != 0


@pytest.mark.slow
def test_a_command_that_is_killed_leaves_no_rank(folder):
    with conversation(folder) as (process, other):
        process.kill()
        other.wait(LIMIT)
        assert not other.is_running()
