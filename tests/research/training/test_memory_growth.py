"""The resident memory of a long fp32 run stays flat, and what keeps it flat changes no loss. See benchmarks/memory.py."""

import pytest

from tests.research.helpers import small_runs
from tests.research.helpers.small_runs import Ended, Stage

MODEL = {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "num_kv_heads": 4, "ffn_size": 512, "seq_length": 128}
"""0.8 M parameters: large enough for glibc's heap to grow by hundreds of MB."""
SETTLED, STEPS, ENOUGH = 200, 2000, 800
"""From this step on growth is counted; so many steps are taken; and so many show that memory grows where the heap is not trimmed."""
MOST = 50.0
"""MB that resident memory may grow by between step 200 and step 2,000."""


def never_trimmed(rank: int) -> None:
    """The heap keeps what it has."""
    from research.cluster.memory import HostMemory

    HostMemory.trim = lambda memory: None  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


def go(stage: Stage, name: str, prelude=None, **schedule: int) -> Ended:
    schedule = {"steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "log_every": 50, **schedule}
    optimizer = {"decay": "constant", "warmup_steps": 4}
    return stage.run(name, 1, prelude=prelude, model=MODEL, schedule=schedule, optimizer=optimizer, checkpoints={"every": 0})


def growth(ended: Ended) -> float:
    """MB by which resident memory has grown since step SETTLED, at most."""
    held = {step: value for step, value in ended.rows("mem/host_mb").items() if step >= SETTLED}
    return max(held.values()) - held[SETTLED]


@pytest.mark.slow
def test_the_memory_of_a_long_run_stays_flat_and_its_losses_are_the_same(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_runs, "LIMIT", 1200.0)
    growing = go(stage, "not trimmed", never_trimmed, steps=ENOUGH)
    flat = go(stage, "trimmed")
    assert flat.codes == growing.codes == [0], flat.said + growing.said
    assert growth(flat) < MOST < growth(growing), (growth(flat), growth(growing))
    for key in ("train/loss", "train/grad_norm"):
        assert growing.hexes(key) == {step: value for step, value in flat.hexes(key).items() if step <= ENOUGH} != {}
