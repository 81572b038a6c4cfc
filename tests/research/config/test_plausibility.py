"""Settings that are right alone and wrong together: each pair is a sentence, and what is shipped has none."""

from pathlib import Path

import pytest
import wandb

from research import ROOT
from research.cluster.environment import Ranks
from research.config import experiment_folder, schema
from research.config.plausibility import contradictions, doubts, doubts_of_ranks, doubts_of_text, refused_by_wandb
from tests.research.helpers.example import example

ROTARY = {"position": "rotary", "rotary_base": 1e4, "rotary_scaling": "none"}
CONTRADICTIONS = [
    (
        {"optimizer": {"lr": 1e-4}},
        "optimizer.min_lr = 0.0003 is above optimizer.lr = 0.0001, so that cosine would raise the learning rate → "
        "use min_lr 1e-05 (a tenth of lr), or decay 'constant'",
    ),
    (
        {"model": {**ROTARY, "rotary_fraction": 0.05}},
        "model.rotary_fraction = 0.05 of heads of 32 features is less than the two that are rotated together, so that no position is "
        "encoded → use 0.07 or more, or position 'none'",
    ),
    (
        {"watch": {"on_spike": "stop"}},
        "watch.on_spike = 'stop' has no effect with watch.spike = 0, which detects no spike → set watch.spike, for example to 6",
    ),
    (
        {"profile": {"memory": True}},
        "profile.memory = True has no effect with profile.steps = None, which records no step → set profile.steps, such as 10-12",
    ),
    (
        {"checkpoints": {"keep_every": 50}},
        "checkpoints.keep_every = 50 has no effect with checkpoints.every = 0 → set checkpoints.every, for example to 50",
    ),
    (
        {"data": {"validation": "builtin:state_of_the_union/train"}},
        "data.validation = 'builtin:state_of_the_union/train' is the text of data.train → name a text that is not trained on",
    ),
]
DOUBTS = [
    (
        {"profile": {"steps": "10-100"}},
        "profile.steps = '10-100' records 91 steps, more than 50: all are kept in memory until the last one, and make the trace long → "
        "use a few, such as 10-12",
    ),
    (
        {"optimizer": {"betas": (0.95, 0.9)}},
        "optimizer.betas = 0.95, 0.9: the gradient's mean is longer than that of its square, the usual order is the other → use 0.9, 0.95",
    ),
    (
        {"optimizer": {"lr": 3.0, "weight_decay": 0.5}},
        "optimizer.lr × optimizer.weight_decay = 3 × 0.5 multiplies every weight by -0.5 in each step → use a smaller one of the two",
    ),
    (
        {"optimizer": {"min_lr": 3e-3}},
        "optimizer.min_lr = optimizer.lr = 0.003, so that cosine decays nothing → use a smaller min_lr",
    ),
    (
        {"optimizer": {"warmup_steps": 300}},
        "optimizer.warmup_steps = 300 are all of schedule.steps = 300, so that cosine has no step left → use fewer warm-up steps",
    ),
    (
        {"schedule": {"batch_ramp": (8, 8, 4000)}},
        "schedule.batch_ramp reaches schedule.batch_size = 16 at step 501, the run has 300 → use fewer samples for the ramp, or more steps",
    ),
    (
        {"schedule": {"length_ramp": (32, 32, 4800)}},
        "schedule.length_ramp reaches model.seq_length = 128 at step 301, the run has 300 → use fewer samples for the ramp, or more steps",
    ),
    (
        {"checkpoints": {"every": 301}},
        "checkpoints.every = 301 is more than schedule.steps = 300: there is none before the end → use fewer",
    ),
    (
        {"checkpoints": {"every": 40, "keep_every": 100}},
        "checkpoints.keep_every = 100 is not a multiple of checkpoints.every = 40: only every 200th step's checkpoint is kept → "
        "use a multiple",
    ),
    (
        {"data": {"train": "mine.txt"}},
        "data.validation = 'builtin:state_of_the_union/val' is not held out of data.train = 'mine.txt': the validation loss is that of "
        "another text → set data.validation to a part of your text that is not trained on",
    ),
    (
        {"evaluate": {"tasks": ("validation", "agreement")}},
        "evaluate.tasks has validation and agreement, which evaluate.every = 0 never evaluates → set evaluate.every",
    ),
    (
        {"evaluate": {"measure": "variant:own"}},
        "evaluate.measure is 'variant:own', which evaluate.every = 0 never calls → set evaluate.every, for example to 50",
    ),
    (
        {"sample": {"prompts": ("peace",)}},
        "sample.prompts is not used with sample.every = 0: the sample at the end continues the held-out text → set sample.every",
    ),
    (
        {"precision": "fp16", "watch": {"most_skips": 3}},
        "watch.most_skips = 3 may stop a run in fp16 while it looks for its loss scale, which begins at 2^16 and is halved where steps "
        "are skipped → use 20, or 0 for no limit",
    ),
]
FINE = [
    {},
    {"optimizer": {"decay": "constant", "lr": 1e-4}},
    {"optimizer": {"betas": (0.95, 0.95)}},
    {"model": {**ROTARY, "rotary_fraction": 0.07}},
    {"schedule": {"batch_ramp": (8, 8, 1600), "length_ramp": (32, 32, 3000)}},
    {"watch": {"spike": 6.0, "on_spike": "stop"}},
    {"checkpoints": {"every": 50, "keep_every": 150}},
    {"schedule": {"validate_every": 1000, "log_every": 1000}, "sample": {"every": 1000}},  # each is done at the end
    {"data": {"train": "mine.txt", "validation": "held_out.txt"}},
    {"precision": "fp16"},
]


def settled(changes: dict) -> schema.Experiment:
    """The example with changes by group, of every group."""
    kinds = (schema.Watch, schema.Checkpoints, schema.Evaluate, schema.Sample, schema.Profile)
    groups = {kind.SECTION: kind for kind in kinds}
    settings = {name: groups[name](**values) if name in groups else values for name, values in changes.items()}
    if "data" in settings:
        settings["data"] = schema.Data(**example().data.model_dump() | settings["data"])
    return example(**settings)


@pytest.mark.parametrize(("changes", "said"), CONTRADICTIONS)
def test_what_cannot_be_meant_is_one_sentence(changes: dict, said: str, tmp_path: Path) -> None:
    assert list(contradictions(settled(changes), tmp_path)) == [said]


@pytest.mark.parametrize(("changes", "said"), DOUBTS)
def test_what_is_hardly_meant_is_one_sentence(changes: dict, said: str, tmp_path: Path) -> None:
    assert list(doubts(settled(changes))) == [said] and list(contradictions(settled(changes), tmp_path)) == []


@pytest.mark.parametrize("changes", FINE)
def test_settings_that_go_together_are_not_mentioned(changes: dict, tmp_path: Path) -> None:
    for name in ("mine.txt", "held_out.txt"):
        (tmp_path / name).write_text(name)
    assert [*contradictions(settled(changes), tmp_path), *doubts(settled(changes))] == []


@pytest.mark.parametrize("name", sorted(path.parent.name for path in (ROOT / "experiments").glob("*/config.py")))
def test_nothing_that_is_shipped_is_doubtful(name: str) -> None:
    experiment = experiment_folder.load(ROOT / "experiments" / name).experiment
    assert [*contradictions(experiment, ROOT), *doubts(experiment), *refused_by_wandb(experiment, name)] == []
    # 8192 tokens are learned from the built-in text, and 70,812 predicted each time (tests/research/data/test_prepare.py)
    assert list(doubts_of_text(experiment, 8192, 70_812)) == []


def test_one_text_under_another_path_is_the_same_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "hard.txt").hardlink_to(tmp_path / "a.txt")
    for name in ("./a.txt", "folder/../a.txt", str(tmp_path / "a.txt"), "folder/link.txt", "hard.txt"):
        data = {"train": "a.txt", "validation": name}
        (said,) = contradictions(settled({"data": data}), tmp_path)
        assert said == f"data.validation = {name!r} is the text of data.train → name a text that is not trained on"


def test_a_text_within_the_folder_of_the_other_is_refused(tmp_path: Path) -> None:
    (tmp_path / "all" / "more").mkdir(parents=True)
    (tmp_path / "all" / "more" / "a.txt").write_text("text")
    (tmp_path / "other").mkdir()
    for train, validation in (("all", "all/more/a.txt"), ("./all/../all/more", "all")):
        (said,) = contradictions(settled({"data": {"train": train, "validation": validation}}), tmp_path)
        assert said.startswith(f"data.validation = {validation!r} and data.train = {train!r} lie one in the other")
    assert list(contradictions(settled({"data": {"train": "all", "validation": "other"}}), tmp_path)) == []


def test_a_vocabulary_with_hardly_any_tokens_is_said_with_the_size_that_fits() -> None:
    (said,) = doubts_of_text(example(), 2114, 1000)
    assert said == (
        "model.vocab_size = 8192, but data.tokenizer = 'builtin:bpe-8192' has 2114 tokens on this text: 6078 rows of the embedding are "
        "never used → use model.vocab_size 2114"
    )
    for tokens, size in ((50257, 50304), (32000, 32064), (50254, 50688), (151_665, 152_064)):  # GPT-2, Llama 2, Pythia, Qwen2 as padded
        assert list(doubts_of_text(example(model={"vocab_size": size}), tokens, 1000)) == []


def test_validations_longer_than_the_training_are_said_with_a_bound_that_ends_the_warning() -> None:
    """300 steps of 2,048 tokens, validated every 10th: 30 passes over 1,000,000 tokens, three of which take as long as one trained."""
    experiment = example(schedule={"validate_every": 10})
    (said,) = doubts_of_text(experiment, 8192, 1_000_000)
    assert said == (
        "30 validations of 1,000,000 tokens will take about 16.3 times as long as the training on 614,400 → "
        "use schedule.validate_tokens 6144, or validate less often"
    )
    assert list(doubts_of_text(experiment, 8192, 6144)) == []
    assert list(doubts_of_text(experiment, 8192, 61_440)) == []  # exactly as long
    assert len(list(doubts_of_text(experiment, 8192, 61_441))) == 1
    assert len(list(doubts_of_text(example(schedule={"validate_every": 0}), 8192, 2_000_000))) == 1


# Weights & Biases.


def tracked(**track: object) -> schema.Experiment:
    return example(track=schema.Track(**track))  # type: ignore[arg-type]


def takes(**settings: object) -> bool:
    """Whether W&B's own client accepts these settings."""
    try:
        wandb.Settings(**settings)
    except (ValueError, wandb.UsageError):
        return False
    return True


def test_what_wandb_refuses_is_refused_before() -> None:
    """Each ASCII character in the name of a project, and of a folder, against W&B's own rules."""
    for letter in map(chr, range(32, 127)):
        name = f"a{letter}b"
        assert (list(refused_by_wandb(tracked(project=name), "x")) == []) == takes(project=name), letter
        if not takes(run_id=f"{name}-000000"):
            assert len(list(refused_by_wandb(tracked(), name))) == 1, letter
    for length, works in ((128, True), (129, False)):
        assert takes(project="p" * length) == works == (not list(refused_by_wandb(tracked(project="p" * length), "x")))
    for length, works in ((64, True), (65, False)):
        assert takes(run_tags=["t" * length]) == works
    assert list(refused_by_wandb(tracked(project="a/b#c"), "x")) == [
        "track.project = 'a/b#c': W&B takes no # or / in the name of a project → leave it out"
    ]
    assert list(refused_by_wandb(tracked(project="a/b#c", mode="disabled"), "x/y")) == []


@pytest.mark.parametrize(
    ("track", "name", "said"),
    [
        ({"group": "g" * 129}, "x", "track.group gives W&B a name of 129 characters, it takes 128 → use a shorter one"),
        ({}, "n" * 122, "the experiment's folder gives W&B a name of 129 characters, it takes 128 → use a shorter one"),
        ({}, " x", "the experiment's folder ' x' names its runs, and W&B takes no space at the beginning of an id → rename the folder"),
        ({}, "x#1", "the experiment's folder 'x#1' names its runs, and W&B takes no # in the id of a run → rename the folder"),
    ],
)
def test_names_that_its_server_refuses(track: dict, name: str, said: str) -> None:
    assert list(refused_by_wandb(tracked(**track), name)) == [said]
    assert list(refused_by_wandb(tracked(group="g" * 128), "n" * 121)) == []


@pytest.mark.parametrize(
    ("world", "local", "tensor", "node", "degrees"),
    [
        (16, 8, 8, "", ""),
        (4, 4, 4, "", ""),
        (16, 8, 16, "8 ranks", "1, 2, 4 or 8"),
        (12, 6, 4, "6 ranks", "1 or 2"),
        (2, 1, 2, "1 rank", "1"),
    ],
)
def test_tensor_ranks_on_several_nodes_are_said_to_be_slow(world: int, local: int, tensor: int, node: str, degrees: str) -> None:
    ranks = Ranks(0, 0, world, local, "torchrun", "a", 1)
    said = (
        f"parallel.tensor = {tensor} does not divide the {node} of a node, so that activations cross the network in every layer → "
        f"use {degrees}, and more of parallel.pipe or of ZeRO"
    )
    assert list(doubts_of_ranks(example(parallel={"tensor": tensor}), ranks)) == ([said] if node else [])
