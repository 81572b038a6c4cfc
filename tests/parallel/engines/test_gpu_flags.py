"""What the engines do otherwise on a GPU, as far as a CPU can run it: DeepSpeed's flags, copies of micro-batches, numbers read per step."""

import math
import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.distributed import PRECISIONS
from parallel.engines import engine as engines
from parallel.engines.deepspeed_config import BUCKET_ELEMENTS, EngineSettings, derive
from parallel.engines.engine import read_numbers
from parallel.engines.micro_batch import COPIED_AHEAD, MicroBatch, copied_ahead
from parallel.errors import Mistake
from tests.harness import run_ranks
from tests.parallel.helpers import training

CPU = torch.device("cpu")
SETTINGS = EngineSettings("fp32", 1, 4, 1, clip=1.0, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def flags_of_gpus(layout: dict) -> tuple[dict, dict]:
    """What a training finds with the derived settings of a CPU, and with those of a GPU."""
    cpu = training.train(5, weights=True, **layout)
    flags = []

    def derived(settings: EngineSettings, cuda: bool) -> dict:
        config = derive(settings, cuda=True)
        flags.append([config["zero_optimization"][name] for name in ("overlap_comm", "contiguous_gradients")])
        return config

    engines.derive = derived
    gpu = training.train(5, weights=True, **layout)
    assert flags == [[True, True]]
    return cpu, gpu


LAYOUTS = {
    "ZeRO-1": dict(micro=2, zero_stage=1),
    "ZeRO-2": dict(micro=2, zero_stage=2),
    "ZeRO-3": dict(micro=2, zero_stage=3),
    "ZeRO-2 bf16": dict(micro=2, zero_stage=2, precision="bf16"),
    "ZeRO-1 fp16": dict(micro=2, zero_stage=1, precision="fp16"),
    "tensor": dict(tensor=2, sequence=True),
    "pipeline": dict(pipe=2, micro=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_overlapping_communication_and_contiguous_gradients_change_no_digit(layout: dict) -> None:
    for cpu, gpu in run_ranks(flags_of_gpus, 2, layout):
        weights, others = cpu.pop("weights"), gpu.pop("weights")
        assert cpu == gpu
        assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def test_buckets_are_larger_on_a_gpu_and_may_be_set() -> None:
    for cuda, device in ((False, "cpu"), (True, "cuda")):
        zero = derive(SETTINGS, cuda=cuda)["zero_optimization"]
        assert {zero["reduce_bucket_size"], zero["allgather_bucket_size"]} == {BUCKET_ELEMENTS[device]}
        assert zero["overlap_comm"] == zero["contiguous_gradients"] == cuda
    assert BUCKET_ELEMENTS["cuda"] > BUCKET_ELEMENTS["cpu"]


def numbered(i: int) -> MicroBatch:
    return MicroBatch(torch.tensor([i]), (torch.tensor([i]), torch.tensor([float(i)])), {"samples": torch.tensor([i])})


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_micro_batches_are_copied_ahead_and_in_order(count: int) -> None:
    read: list[int] = []

    def batches():
        for i in range(count):
            read.append(i)
            yield numbered(i)

    given = []
    for batch in copied_ahead(batches(), CPU):
        given.append(int(batch.ids))
        assert len(read) == min(len(given) + COPIED_AHEAD, count)  # the next ones are under way, and no more than those
    assert given == list(range(count))


def test_numbers_are_read_together_and_exactly() -> None:
    values = [torch.tensor(0.1), torch.tensor(math.inf), torch.tensor(1e-300, dtype=torch.float64), torch.tensor([3.0])]
    assert read_numbers(*values) == [float(value) for value in values]
    assert math.isnan(read_numbers(torch.tensor(math.nan))[0])


class ScalarReads(TorchDispatchMode):
    """Records who reads a single number from a tensor, on a GPU each a wait of the host: the file that is innermost in this repository."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        if function.overloadpacket.__name__ == "_local_scalar_dense":
            files = [frame.filename for frame in traceback.extract_stack()[:-1]]
            self.sites.append(next(file for file in reversed(files) if "/torch/" not in file))
        return function(*arguments, **(settings or {}))


def scalar_reads(layout: dict) -> list[str]:
    engine, shape, grid = training.build(**layout)
    batches = [list(training.micro_batches(step, shape, grid, engine.settings.micro_batch_size)) for step in range(2)]
    engine.train_batch(batches[0], 1e-3)
    with ScalarReads() as reads:
        engine.train_batch(batches[1], 1e-3)
        engine.gradient_norm()
    return [file for file in reads.sites if "/deepspeed/" not in file]


@pytest.mark.parametrize("layout", [dict(), dict(pipe=2)], ids=["data", "pipeline"])
def test_a_step_of_ours_reads_no_single_number(layout: dict) -> None:
    """Loss and norm are read together, by one copy of both."""
    assert run_ranks(scalar_reads, 2, layout) == [[], []]


@pytest.mark.parametrize(("supported", "precision"), [(False, "bf16"), (True, "bf16"), (False, "fp32")])
def test_bf16_needs_a_gpu_that_computes_it(supported: bool, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulation does not count."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or supported)
    monkeypatch.setattr(engines, "device_name", lambda: "Tesla V100, 16.9 GB")
    assert precision in PRECISIONS
    if supported or precision == "fp32":
        return engines.refuse_precision(precision)
    with pytest.raises(Mistake) as refused:
        engines.refuse_precision(precision)
    assert (
        str(refused.value) == "precision = 'bf16' needs bf16 kernels, which this GPU (Tesla V100, 16.9 GB) has not → use 'fp16' or 'fp32'"
    )
    return None
