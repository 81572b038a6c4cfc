"""Random generators continue where they stopped, and changes of the layout or the machine are named with both values."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from parallel.engines.process_state import arithmetic, differences, generators, set_generators
from parallel.errors import Mistake
from parallel.grid import Grid
from tests.harness import run_ranks
from tests.parallel.helpers import training


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), *torch.rand(3).tolist()]


@pytest.mark.parametrize("seed", [0, 1])
def test_generators_go_on_where_they_stood(seed: int) -> None:
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    random.gauss(0, 1), np.random.randn(), torch.rand(7)  # each keeps half of a pair for the next call
    state = json.loads(json.dumps(generators()))
    first = draws()
    assert draws() != first
    set_generators(state)
    assert draws() == first


def test_on_a_gpu_the_machine_says_whether_kernels_are_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it does not, so that older checkpoints, which say nothing of it, are the same machine."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    settings = SimpleNamespace(
        zero_stage=1, offload_optimizer=False, offload_parameters=False, precision="fp32", micro_batch_size=1, micro_batches=1
    )
    machines = [
        arithmetic(SimpleNamespace(grid=Grid(), settings=settings, device=torch.device(kind)))["machine"] for kind in ("cpu", "cuda")
    ]
    assert "deterministic" not in machines[0] and machines[1]["deterministic"] is False
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert arithmetic(SimpleNamespace(grid=Grid(), settings=settings, device=torch.device("cuda")))["machine"]["deterministic"] is True


BROKEN = [None, 3, [], {}, {"python": []}, {"python": [3, "not base64!", None]}, {"python": [3, "AAAA", None]}, "text"]
BROKEN += [lambda state: state.update(torch="AAAA"), lambda state: state.pop("torch")]
BROKEN += [lambda state: state.update(numpy=["PCG64", "AAAA", 0, 0, 0.0])]


@pytest.mark.parametrize("broken", BROKEN, ids=range(len(BROKEN)))
def test_what_is_no_state_is_refused_in_words(broken) -> None:
    state = broken
    if callable(broken):
        broken(state := generators())
    with pytest.raises(Mistake, match="random generators cannot be set .* → use another checkpoint"):
        set_generators(state)


def told(facts: dict | None) -> tuple[dict, dict]:
    engine, *_ = training.build(pipe=2, model={"num_layers": 2}, precision="bf16")
    return arithmetic(engine), differences(arithmetic(engine) if facts is None else facts, engine)


def test_what_bits_depend_on_is_told() -> None:
    (found, same), _ = run_ranks(told, 2, None)
    assert json.loads(json.dumps(found)) == found and same == {}
    assert found["layout"] == {
        "pipe": 2, "data": 1, "tensor": 1, "sequence": False, "zero_stage": 1, "offload_optimizer": False, "offload_parameters": False,
        "precision": "bf16", "micro_batch_size": 4, "micro_batches": 2,
    }  # fmt: skip
    assert found["machine"] | {"instruction_set": "", "deepspeed": ""} == {
        "world": 2, "threads": 1, "instruction_set": "", "device": "cpu", "torch": torch.__version__, "deepspeed": "",
    }  # fmt: skip
    assert found["machine"]["instruction_set"] == torch.backends.cpu.get_cpu_capability()


def test_what_changed_is_named_with_both_values() -> None:
    facts = {"layout": {"pipe": 1}, "machine": "not a table"}
    (found, changed), _ = run_ranks(told, 2, facts)
    assert changed["layout.pipe"] == (1, 2) and changed["machine.threads"] == (None, 1)
    assert len(changed) == len(found["layout"]) + len(found["machine"])
