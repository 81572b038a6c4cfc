"""A checkpoint saved in the background equals one saved at once, whatever training does meanwhile, and all ranks publish it together."""

import json
import threading
from pathlib import Path

import pytest
import torch

from parallel.checkpoint import tensor_file
from parallel.checkpoint.folder import latest
from parallel.checkpoint.reader import Reader
from parallel.checkpoint.saver import BackgroundSaver, Saver
from parallel.engines.engine import Engine
from parallel.errors import Mistake
from parallel.grid import Grid
from tests.harness import run_ranks
from tests.parallel.helpers import training
from tests.parallel.helpers.checkpoints import hidden

SMALL = {"num_layers": 2}
LAYOUTS = {"TP2": (2, dict(tensor=2)), "DP2, bf16": (2, dict(micro=2, precision="bf16")), "ZeRO-3": (2, dict(micro=2, zero_stage=3))}


def step(engine: Engine, shape, grid: Grid, number: int) -> None:
    engine.train_batch(training.micro_batches(number, shape, grid, engine.settings.micro_batch_size), training.learning_rate(number))


def both_ways(checkpoints: Path, settings: dict) -> list[str]:
    """After a step the same state by both; the one in the background is written while two more steps are taken."""
    engine, shape, grid = training.build(model=SMALL, **settings)
    step(engine, shape, grid, 0)
    at_once, background = Saver(), BackgroundSaver()
    at_once.save(checkpoints / "step_1", engine, {"step": 1})
    go_on = threading.Event()
    inner = tensor_file.TensorFile.add

    def held_up(self, tensor) -> None:
        go_on.wait()
        inner(self, tensor)

    tensor_file.TensorFile.add = held_up
    background.save(checkpoints / "step_2", engine, {"step": 1})
    step(engine, shape, grid, 1)
    assert background.poll() == []
    step(engine, shape, grid, 2)
    go_on.set()
    return [saved.folder.name for saver in (at_once, background) for saved in saver.wait()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_saved_is_the_state_when_save_was_called(layout: str, tmp_path: Path) -> None:
    world, settings = LAYOUTS[layout]
    assert run_ranks(both_ways, world, tmp_path, settings) == [["step_1", "step_2"]] * world
    at_once, background = (json.loads((tmp_path / f"step_{i}" / "manifest.json").read_text()) for i in (1, 2))
    assert at_once == background, "every file's hash, every fact"
    assert latest(tmp_path).name == "step_2" and hidden(tmp_path) == []


def poll_in_turn(checkpoints: Path) -> list[list[str]]:
    """Rank 1's writer ends before rank 0's: nothing is published until both have."""
    engine, shape, grid = training.build(tensor=2, model=SMALL)
    may_write = threading.Event()
    inner = tensor_file.TensorFile.close

    def held_up(self):
        may_write.wait()
        return inner(self)

    tensor_file.TensorFile.close = held_up
    saver = BackgroundSaver()
    saver.save(checkpoints / "step_1", engine, {"step": 0})
    found = [saver.poll()]
    if grid.rank == 1:
        may_write.set()
        saver._writing[1].join()
    torch.distributed.barrier()
    found.append(saver.poll())
    assert not (checkpoints / "step_1").exists()
    may_write.set()
    saver._writing[1].join()
    torch.distributed.barrier()
    found += [saver.poll(), saver.poll(), saver.wait()]
    return [[saved.folder.name for saved in published] for published in found]


def test_it_is_published_when_the_last_rank_has_written(tmp_path: Path) -> None:
    assert run_ranks(poll_in_turn, 2, tmp_path) == [[[], [], ["step_1"], [], []]] * 2


def save_twice(checkpoints: Path) -> list[str]:
    engine, shape, grid = training.build(model=SMALL)
    saver = BackgroundSaver()
    for number in (1, 2):
        step(engine, shape, grid, number)
        saver.save(checkpoints / f"step_{number}", engine, {"step": number})
    assert (checkpoints / "step_1").is_dir(), "the second waited for the first"
    return [saved.folder.name for saved in saver.wait()]


def test_a_second_save_waits_for_the_first_and_both_are_told(tmp_path: Path) -> None:
    assert run_ranks(save_twice, 1, tmp_path) == [["step_1", "step_2"]]


def fail_in_the_background(checkpoints: Path) -> tuple[str, float, list[str]]:
    engine, shape, grid = training.build(tensor=2, model=SMALL)
    saver = BackgroundSaver()
    inner = tensor_file.TensorFile.add
    if grid.rank == 1:

        def full(self, tensor) -> None:
            raise OSError(28, "No space left on device")

        tensor_file.TensorFile.add = full
    saver.save(checkpoints / "step_1", engine, {"step": 0})
    step(engine, shape, grid, 0)
    try:
        saver.wait()
        told = "saved"
    except Mistake as mistake:
        told = str(mistake)
    tensor_file.TensorFile.add = inner
    torch.distributed.barrier()
    left = sorted(path.name for path in checkpoints.iterdir())
    torch.distributed.barrier()
    saver.save(checkpoints / "step_2", engine, {"step": 1})
    return told, float(len(saver.wait())), left


def test_a_writer_that_fails_is_told_by_all_and_the_next_save_works(tmp_path: Path) -> None:
    first, second = run_ranks(fail_in_the_background, 2, tmp_path)
    assert first == second and "No space left on device: the checkpoint needs" in first[0] and first[1:] == (1.0, [])
    with Reader(latest(tmp_path)) as reader:
        reader.check()
        assert reader.folder.name == "step_2"


def facts_of(checkpoints: Path) -> list[str]:
    engine, *_ = training.build(model={"num_layers": 1})
    told = []
    for facts in ({}, {"step": "3"}, {"step": 1, "layout": {}}, {"step": 1, "counters": 3}):
        with pytest.raises(ValueError) as refused:
            Saver().save(checkpoints / "step_1", engine, facts)
        told.append(str(refused.value))
    return told


def test_facts_have_a_step_and_leave_the_engine_its_own(tmp_path: Path) -> None:
    (told,) = run_ranks(facts_of, 1, tmp_path)
    assert all(words.startswith("a checkpoint's facts have a step") for words in told) and list(tmp_path.iterdir()) == []
