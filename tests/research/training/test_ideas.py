"""The examples of docs/ideas.md as one experiment: its own attention, loss, optimizer, schedule and measurement, on real engines."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from parallel.errors import Mistake
from parallel.grid import Grid
from research import ROOT
from research.config.experiment_folder import LoadedExperiment, load, load_variants, variant_names
from research.tracking import metrics
from research.training import components
from research.training.measurement import measured_row
from tests.research.helpers.example import example, sentence
from tests.research.helpers.small_runs import Ended, Stage, bits, stopped_in_step_6

IDEAS = {
    "model": {"attention": "variant:WindowAttention", "seq_length": 40},
    "loss": "variant:FocalLoss",
    "optimizer": {
        "name": "variant:Momentum",
        "decay": "variant:two_levels",
        "lr": 0.3,
        "weight_decay": 1e-3,
        "label_smoothing": 0.1,
        "warmup_steps": 3,
    },
    "evaluate": {"every": 4, "tasks": (), "measure": "variant:output_norms"},
    "schedule": {"validate_every": 4},
}
LAYOUTS = {
    "tensor_2": (2, {"tensor": 2, "sequence": True}),
    "pipe_2": (2, {"pipe": 2}),
    "zero_2": (2, {"zero_stage": 2}),
    "zero_3": (2, {"zero_stage": 3}),
    "offload": (2, {"zero_stage": 2, "offload_optimizer": True}),
}


def examples() -> str:
    """The Python of docs/ideas.md."""
    return "\n\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/ideas.md").read_text(), re.DOTALL | re.MULTILINE))


class IdeaStage(Stage):
    """Small runs of a copy of gpt_sotu with the variant.py of docs/ideas.md."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        folder = place / "idea"
        shutil.copytree(ROOT / "experiments/gpt_sotu", folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "variant.py").write_text(examples())
        self.loaded = load(folder)

    def small(self, name: str, changes: dict) -> LoadedExperiment:
        merged = {group: {**value, **changes.get(group, {})} if isinstance(value, dict) else value for group, value in IDEAS.items()}
        return super().small(name, {**changes, **merged})


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> IdeaStage:
    return IdeaStage(tmp_path_factory.mktemp("ideas"))


@pytest.fixture(scope="module")
def alone(stage: IdeaStage) -> Ended:
    return stage.run("alone")


def test_the_examples_define_what_the_settings_name(tmp_path: Path) -> None:
    (tmp_path / "variant.py").write_text(examples())
    idea = example(**IDEAS)
    found = load_variants(tmp_path, idea)
    assert set(found) == set(variant_names(idea).values()) == {"WindowAttention", "FocalLoss", "Momentum", "two_levels", "output_norms"}
    assert components.optimizer_class(idea, found) is found["Momentum"]
    assert type(components.training_loss(idea, None, found)) is found["FocalLoss"]
    assert components.optimizer_class(example(), {}) is None


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (None, "does not say what it keeps per parameter → give the class an attribute such as state_names"),
        ("momentum_buffer", "does not say what it keeps"),
        (("Momentum",), "does not say what it keeps"),
        (("weights",), "→ name each tensor once, and none of them weights or step"),
        (("momentum_buffer", "step"), "none of them weights or step"),
        (("momentum_buffer", "momentum_buffer"), "name each tensor once"),
    ],
)
def test_an_optimizer_without_usable_state_names_is_refused_when_it_is_chosen(names: object, said: str) -> None:
    silent = type("Silent", (torch.optim.SGD,), {} if names is None else {"state_names": names})
    assert said in sentence(lambda: components.optimizer_class(example(optimizer={"name": "variant:Silent"}), {"Silent": silent}))


def test_a_function_is_no_optimizer_class() -> None:
    idea = example(optimizer={"name": "variant:make"})
    assert "names no class → write a subclass" in sentence(lambda: components.optimizer_class(idea, {"make": lambda groups, **_: None}))


def test_the_focal_loss_is_the_formula(tmp_path: Path) -> None:
    (tmp_path / "variant.py").write_text(examples())
    idea = example(loss="variant:FocalLoss")
    logits = torch.randn(2, 5, idea.model.vocab_size, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(0, idea.model.vocab_size, (2, 5)), torch.rand(2, 5, dtype=torch.float64)
    p = logits.softmax(-1).gather(-1, targets[..., None])[..., 0]
    expected = -(weights * (1 - p) ** 2 * p.log()).sum()
    found = components.training_loss(idea, None, load_variants(tmp_path, idea))(logits, (targets, weights))
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(*(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, expected)), atol=1e-14)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0], "returned [1.0] at step 4 → return a dict of numbers by name"),
        ({3: 1.0}, "returned {3: 1.0} at step 4 → return a dict"),
        ({"norm": "big"}, "returned 'big' for 'norm' at step 4 → return one number for each name"),
        ({"norm": torch.ones(2)}, "→ return one number for each name"),
    ],
)
def test_a_measurement_that_returns_no_numbers_is_refused(returned: object, said: str) -> None:
    with pytest.raises(Mistake, match=re.escape(said)):
        measured_row(lambda step, model: returned, 4, None)


def test_a_measurement_that_raises_is_a_sentence() -> None:
    with pytest.raises(Mistake, match="evaluate.measure failed at step 4: ZeroDivisionError: division by zero → correct it"):
        measured_row(lambda step, model: {"x": 1 / 0}, 4, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_the_idea_alike(stage: IdeaStage, alone: Ended, name: str) -> None:
    """Training losses to 2e-5, held-out losses and the measurement to 1e-5; and the idea is not what gpt_sotu trains."""
    world, parallel = LAYOUTS[name]
    found = stage.run(name, world, parallel=parallel)
    assert found.codes == [0] * world, found.said
    for key, tolerance in [("train/loss", 2e-5), ("val/loss", 1e-5), ("train/lr", 0), *((key, 1e-5) for key in measured(alone))]:
        assert found.rows(key) == pytest.approx(alone.rows(key), rel=tolerance), key
    assert len(measured(alone)) == 2 and set(alone.rows(measured(alone)[0])) == {4, 8, 12}


def measured(run: Ended) -> list[str]:
    return sorted({key for row in metrics.read(run.folder.metrics) for key in row if key.startswith("measure/")})


@pytest.mark.slow
def test_the_held_out_loss_is_the_plain_cross_entropy(stage: IdeaStage, alone: Ended) -> None:
    """From the last checkpoint's weights, by a model whose attention is written out with a mask. Training minimises something else."""
    from models import gpt
    from parallel.layers import PlainModule, unique_parameters
    from research.data import prepare

    loaded = stage.small("alone", {})
    experiment, model = loaded.experiment, loaded.experiment.model
    weights = {key.split()[-1]: value for key, value in tensors_of(alone).items()}
    module = PlainModule(gpt.layers(model, Grid(), 0, load_variants(loaded.folder, model)))
    with torch.no_grad():
        for name, parameter in unique_parameters(module):
            parameter.copy_(weights[name])
    tokens = torch.tensor(prepare.load(experiment.data, ROOT, model.vocab_size).validation.tokens[:].astype("int64"))
    nats, count = 0.0, 0
    for start in range(0, len(tokens) - 1, model.seq_length):
        ids = tokens[start : start + model.seq_length + 1]
        nats += float(nn.functional.cross_entropy(module(ids[None, :-1])[0].detach(), ids[1:], reduction="sum"))
        count += len(ids) - 1
    assert alone.rows("val/loss")[12] == pytest.approx(nats / count, rel=1e-5)


def tensors_of(run: Ended) -> dict[str, torch.Tensor]:
    from parallel.checkpoint.reader import Reader

    with Reader(run.folder.checkpoints / (run.folder.checkpoints / "latest").read_text()) as reader:
        return {name: reader.read(name) for name in reader}


@pytest.fixture(scope="module")
def stopped(stage: IdeaStage) -> Iterator[Ended]:
    yield stage.run("stopped", prelude=stopped_in_step_6)


@pytest.mark.slow
def test_a_resumed_idea_is_bit_for_bit_the_uninterrupted_one(stage: IdeaStage, alone: Ended, stopped: Ended) -> None:
    assert stopped.rows().keys() == set(range(1, 7)), stopped.said
    resumed = stage.run("stopped", resume="auto")
    assert resumed.codes == [0], resumed.said
    assert resumed.hexes() == alone.hexes()
    assert bits(resumed.folder) == bits(alone.folder) and any(key.startswith("momentum_buffer") for key in bits(alone.folder))


@pytest.mark.slow
def test_an_optimizer_that_does_not_say_what_it_keeps_is_refused(stage: IdeaStage) -> None:
    loaded = stage.small("silent", {})
    (loaded.folder / "variant.py").write_text(examples().replace("    state_names = ", "    other_names = "))
    try:
        silent = stage.run("silent")
    finally:
        (loaded.folder / "variant.py").write_text(examples())
    assert silent.codes == [2] and "the optimizer Momentum does not say what it keeps per parameter" in silent.said
    assert silent.run is None, "refused before its first step"
