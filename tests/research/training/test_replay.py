"""A step that went wrong is run again in one process, and what is first not finite is named."""

import math

import pytest
import torch

from models import config, gpt
from parallel.engines.micro_batch import MicroBatch
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import PlainModule
from research.cli.replay import show
from research.config import serialization
from research.tracking.console import Console
from research.tracking.run_folder import RunFolder
from research.training import replay
from tests.parallel.helpers.training import MODEL
from tests.research.helpers import small_runs as r
from tests.research.helpers.small_runs import Stage

EXPLODES = {"optimizer": {"lr": 1e30, "clip": 0.0, "warmup_steps": 0}}
"""One step makes weights whose squares are infinite: the second step's loss is NaN on every layout, and again in every replay."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


def replayed(folder: RunFolder, step: int, capsys) -> tuple[replay.Examined, str]:
    experiment, console = serialization.load(folder.config), Console()
    corpus, found = replay.replay(folder, experiment, step, console)
    show(console, folder, experiment, corpus, step, found)
    return found, capsys.readouterr().out


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_loss_that_explodes_is_found_again_by_module_and_sample(stage: Stage, capsys, precision: str) -> None:
    ended = stage.run(f"explodes_{precision}", 2, parallel={"tensor": 2}, precision=precision, **EXPLODES)
    assert set(ended.codes) == {3} and "step 2" in ended.said, ended.said
    found, said = replayed(ended.folder, 2, capsys)
    assert found.culprits[0].phase == "forward" and found.culprits[0].name.startswith("blocks.0.")
    assert math.isnan(found.loss) and "from step_000002, no step in between" in said
    assert "forward  blocks.0." in said and "text     sample 8: " in said


def test_a_fault_of_one_rank_is_finite_in_one_process_and_the_rank_is_named(stage: Stage, capsys) -> None:
    ended = stage.run("rank_1", 2, prelude=r.nan_gradient_in_step_5)
    assert set(ended.codes) == {3}, ended.said
    found, said = replayed(ended.folder, 5, capsys)
    assert found.culprits == [] and math.isfinite(found.loss)
    assert "lay in a rank or its machine" in said and "rank 1 (pipe 0, data 1, tensor 0): blocks.1.mlp.up.weight" in said


def test_any_step_can_be_reached_from_the_checkpoint_before_it(stage: Stage, capsys) -> None:
    """Two steps are trained again; loss and norm are those that the run recorded."""
    ended = stage.run("calm", 2, parallel={"pipe": 2})
    assert set(ended.codes) == {0}, ended.said
    found, said = replayed(ended.folder, 12, capsys)
    assert "from step_000009, 2 steps trained again" in said
    assert abs(found.loss - ended.rows()[12]) <= 2e-5 * ended.rows()[12]
    assert abs(found.grad_norm - ended.rows("train/grad_norm")[12]) <= 1e-4 * found.grad_norm


def test_a_step_that_is_none_is_refused(stage: Stage) -> None:
    with pytest.raises(Mistake, match="count from 1"):
        replay.replay(RunFolder(stage.place), None, 0, Console())  # type: ignore[arg-type]


# examine, on a module with something wrong put into it.


def module_and_batch() -> tuple[PlainModule, MicroBatch, gpt.TokenLoss]:
    model = config.GPT(**MODEL)
    module = PlainModule(gpt.layers(model, Grid(), 0))
    ids = torch.arange(3 * 16).reshape(3, 16) % model.vocab_size
    return module, MicroBatch(ids, (ids, torch.ones(3, 16) / 48)), gpt.TokenLoss(model.vocab_size, 0.0, None)


def test_all_is_well_with_a_healthy_step() -> None:
    module, batch, loss = module_and_batch()
    found = replay.find_non_finite(module, loss, [batch, batch])
    assert found.culprits == [] and 4 < found.loss < 5 and found.grad_norm > 0


def test_a_weight_that_is_not_finite_comes_first() -> None:
    module, batch, loss = module_and_batch()
    with torch.no_grad():
        module.get_parameter("blocks.1.mlp.down.weight")[2, 3] = math.inf
    found = replay.find_non_finite(module, loss, [batch])
    assert [(c.phase, c.name, c.what) for c in found.culprits[:1]] == [("weights", "blocks.1.mlp.down.weight", "1 of 2048 values")]
    assert found.culprits[1].phase == "forward" and found.culprits[1].name == "blocks.1.mlp.down"


def test_the_row_and_the_micro_batch_are_told() -> None:
    module, batch, loss = module_and_batch()
    handle = module.get_submodule("blocks.2.attention.core").register_forward_hook(
        lambda core, inputs, y: y.index_fill(0, torch.tensor([1]), math.nan) if bool(inputs[0].abs().sum()) else None
    )
    found = replay.find_non_finite(module, loss, [batch])
    handle.remove()
    first = found.culprits[0]
    assert (first.phase, first.micro_batch, first.rows) == ("forward", 0, (1,)) and first.name.startswith("blocks.2.attention")


def test_a_gradient_alone_is_named_by_layer_and_parameter() -> None:
    module, batch, loss = module_and_batch()
    module.get_parameter("blocks.0.mlp.up.bias").register_hook(lambda gradient: gradient * math.nan)
    found = replay.find_non_finite(module, loss, [batch])
    assert [(c.phase, c.name) for c in found.culprits] == [("backward", "blocks.0.mlp.up.bias")]
