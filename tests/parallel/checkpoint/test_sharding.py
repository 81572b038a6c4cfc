"""Every part is written by exactly one rank, the work is divided evenly, and the written tensors are those of the engine."""

import functools
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from models import gpt
from models.config import GPT
from parallel.checkpoint.sharding import assign_writers, gather_shards, parts_of
from parallel.checkpoint.writer import Part
from parallel.engines.optimizer_state import ensure_moments
from parallel.grid import Grid
from parallel.layers import PlainModule
from tests.harness import run_ranks
from tests.parallel.helpers import training
from tests.parallel.helpers.checkpoints import all_but_slow, by_another_reader
from tests.parallel.helpers.training import MODEL, SEED

LAYOUTS = {
    "one rank": (1, {}),
    "TP2": (2, dict(tensor=2)),
    "DP2": (2, dict(micro=2)),
    "ZeRO-2, offloaded": (2, dict(zero_stage=2, micro=2, offload_optimizer=True)),
    "ZeRO-3": (2, dict(zero_stage=3)),
    "PP2, bf16": (2, dict(pipe=2, precision="bf16")),
    "TP2·PP2": (4, dict(tensor=2, pipe=2)),
    "TP2·ZeRO-3": (4, dict(tensor=2, zero_stage=3, micro=2)),
    "ZeRO-3 on three": (3, dict(zero_stage=3, micro=2)),  # which divide no parameter's size
    "DP3, bf16": (3, dict(micro=2, precision="bf16")),
}


@functools.cache
def written(layout: str, steps: int) -> dict[str, dict[str, np.ndarray]]:
    """What a checkpoint holds, by another reader."""
    world, settings = LAYOUTS[layout]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / f"step_{steps}"
        run_ranks(training.call, world, dict(settings, steps=steps, save=str(folder)))
        return by_another_reader(folder)


def initial_weights() -> dict[str, np.ndarray]:
    """The logical weights as one process draws them."""
    module = PlainModule(gpt.layers(GPT(**MODEL), Grid(), seed=SEED))
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("layout", all_but_slow(LAYOUTS, {"TP2·PP2", "ZeRO-3 on three", "PP2, bf16"}))
def test_untrained_weights_are_the_drawn_ones_bit_for_bit(layout: str) -> None:
    """Whole and without padding; the tied table once. Moments are zero before the first step."""
    found, expected = written(layout, 0), initial_weights()
    if "bf16" in layout:  # the masters are made from the rounded weights
        expected = {name: torch.from_numpy(value).bfloat16().float().numpy() for name, value in expected.items()}
    assert set(found) == {"weights", "exp_avg", "exp_avg_sq"} and all(set(table) == set(expected) for table in found.values())
    assert expected["embedding.weight"].shape == (83, 32) and "head.weight" not in expected
    for name, value in expected.items():
        assert found["weights"][name].tobytes() == value.tobytes() and found["weights"][name].shape == value.shape, name
        assert not found["exp_avg"][name].any() and not found["exp_avg_sq"][name].any()


@pytest.mark.parametrize("layout", all_but_slow(["TP2", "ZeRO-3", "TP2·PP2"], {"TP2·PP2"}))
def test_trained_state_is_that_of_one_rank(layout: str) -> None:
    found, expected = written(layout, 3), written("one rank", 3)
    for kind, table in expected.items():
        whole = np.sqrt(sum(np.linalg.norm(value) ** 2 for value in table.values()))
        for name, value in table.items():
            scale = max(np.linalg.norm(value), 1e-6 * whole)
            assert np.linalg.norm(found[kind][name] - value) <= 2e-5 * scale, (kind, name)
    before = initial_weights()
    moved = max(np.linalg.norm(value - before[name]) / np.linalg.norm(value) for name, value in expected["weights"].items())
    assert moved > 1e-3, "nothing was trained, so nothing was compared"


def dealt(settings: dict) -> tuple[list[Part], list[tuple[int, ...]], list[str], int]:
    """What a rank writes, the shapes that it then yields, the names that travel to their writer, and the bytes it writes."""
    engine, *_ = training.build(**settings)
    ensure_moments(engine)
    shares = assign_writers(engine)
    parts = parts_of(engine, shares)
    shapes = [tuple(tensor.shape) for tensor in gather_shards(engine, shares)]
    return parts, shapes, [share.name for share in shares if not share.alone], sum(part.entry.size for part in parts)


@pytest.mark.parametrize("layout", all_but_slow(LAYOUTS, {"TP2·PP2", "TP2·ZeRO-3", "ZeRO-2, offloaded"}))
def test_all_ranks_write_about_as_much_each_their_own(layout: str) -> None:
    world, settings = LAYOUTS[layout]
    ranks = run_ranks(dealt, world, settings)
    for parts, shapes, _, _ in ranks:
        assert [part.entry.shape for part in parts] == shapes
    everything = [part for parts, *_ in ranks for part in parts]
    assert len(set(everything)) == len(everything), "two ranks write the same"
    sizes = [size for *_, size in ranks]
    tables = 12 * (83 + 16) * 32  # the first stage's own; the last has a copy of one
    assert max(sizes) - min(sizes) <= tables, sizes


def test_stages_one_and_two_send_only_what_lies_across_a_border() -> None:
    """Two groups of parameters, matrices and vectors, each cut once between two ranks: at most one of each travels."""
    for _, _, travelling, _ in run_ranks(dealt, 2, dict(micro=2)):
        assert len(travelling) <= 2
    for parts, _, travelling, _ in run_ranks(dealt, 2, dict(micro=2, zero_stage=3)):
        assert len(travelling) > 20 and parts, "stage 3 cuts every parameter"


def test_what_tensor_ranks_hold_alike_is_dealt_out() -> None:
    ranks = run_ranks(dealt, 2, dict(tensor=2))
    whole = [{part.name for part in parts if part.length == part.whole[part.dim]} for parts, *_ in ranks]
    assert not whole[0] & whole[1] and min(map(len, whole)) > 5
    assert {name.rsplit(".", 2)[-2] for name in whole[0] | whole[1]} >= {"attention_norm", "final_norm", "position"}


KEYS = [
    (Part("weights", "a", (6, 4), 0, 0, 6), "a", (6, 4)),
    (Part("weights", "a", (6, 4), 0, 2, 3), "a[2:5]", (3, 4)),
    (Part("weights", "a", (6, 4), 1, 0, 2), "a[:,0:2]", (6, 2)),
    (Part("weights", "a", (6,), 0, 5, 1), "a[5:6]", (1,)),
]


@pytest.mark.parametrize(("part", "key", "shape"), KEYS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_key_says_which_rows(part: Part, key: str, shape: tuple) -> None:
    assert (part.entry.key, part.entry.shape) == (key, shape)


def slow_writer(settings: dict, ahead: int) -> bool:
    """Ranks that dawdle in turn, with little room to receive ahead: the order of sends and receives must not matter."""
    engine, _, grid = training.build(model={"num_layers": 1}, **settings)
    ensure_moments(engine)
    shares = assign_writers(engine)
    expected = dict(engine.full_weights())
    parts = parts_of(engine, shares)
    for i, (part, tensor) in enumerate(zip(parts, gather_shards(engine, shares, ahead), strict=True)):
        if i % 3 == grid.data_rank:
            time.sleep(0.01)
        if part.kind == "weights" and not torch.equal(tensor, expected[part.name].narrow(part.dim, part.start, part.length)):
            return False
    return True


WAITING = [(layout, ahead) for layout in ("ZeRO-3", "TP2·ZeRO-3", "ZeRO-3 on four", "DP4") for ahead in (0, 5000, 2**30)]
FOUR = {"ZeRO-3 on four": (4, dict(zero_stage=3, micro=2)), "DP4": (4, dict(micro=2))}


@pytest.mark.parametrize(("layout", "ahead"), all_but_slow(WAITING, {("ZeRO-3", 0), ("ZeRO-3 on four", 5000)}))
def test_ranks_that_wait_for_each_other_come_to_an_end(layout: str, ahead: int) -> None:
    world, settings = (LAYOUTS | FOUR)[layout]
    assert run_ranks(slow_writer, world, settings, ahead) == [True] * world
