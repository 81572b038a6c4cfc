"""The resident memory of a long fp32 run stays flat, and what keeps it flat changes no loss. See benchmarks/memory.py."""

import pytest

from tests.research.helpers.small_runs import Ended, Stage

MODEL = {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "num_kv_heads": 4, "ffn_size": 512, "seq_length": 64}
"""0.8 M parameters: large enough for glibc's heap to grow by hundreds of MB."""
SETTLED, STEPS = 200, 2000
MOST = 60.0
"""MB that resident memory may grow by between step 200 and step 2,000."""


def never_trimmed(rank: int) -> None:
    """The heap keeps what it has."""
    from research.cluster.memory import HostMemory

    HostMemory.trim = lambda memory: None  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


def go(stage: Stage, name: str, prelude=None) -> Ended:
    schedule = {"steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "log_every": 50}
    return stage.run(name, 1, prelude=prelude, model=MODEL, schedule=schedule, checkpoints={"every": 0})


@pytest.mark.slow
def test_the_memory_of_a_long_run_stays_flat_and_its_losses_are_the_same(stage: Stage) -> None:
    flat, growing = go(stage, "trimmed"), go(stage, "not trimmed", never_trimmed)
    assert flat.codes == growing.codes == [0]
    grown = {}
    for ended in (flat, growing):
        held = {step: value for step, value in ended.rows("mem/host_mb").items() if step >= SETTLED}
        grown[ended] = max(held.values()) - held[SETTLED]
    assert grown[flat] < MOST < grown[growing], "without the trim, the test would see growth"
    assert flat.hexes() == growing.hexes() and flat.hexes("train/grad_norm") == growing.hexes("train/grad_norm") != {}
