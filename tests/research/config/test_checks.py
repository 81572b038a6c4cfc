"""Every pair of settings that cannot go together is refused in one sentence; every layout that can is let through."""

import itertools

import pytest

from research.cluster.environment import Ranks
from research.config import Parallel, Profile
from research.config.checks import check
from research.config.layout import effective_zero_stage, layout
from tests.research.helpers.example import example, sentence


def ranks(world: int, launcher: str = "deepspeed", nodes: int = 1) -> Ranks:
    return Ranks(0, 0, world, world // nodes, launcher, "127.0.0.1", 29500)  # type: ignore[arg-type]


GQA = {"num_heads": 12, "num_kv_heads": 3}
SMOLLM2 = {"num_layers": 30, "hidden_size": 576, "num_heads": 9, "num_kv_heads": 3, "ffn_size": 1536}
SMALL = {"steps": 10}
CASES = [
    ({"parallel": {"tensor": 4}}, 4, "parallel.tensor = 4 does not divide model.num_heads = 6 → use 1, 2, 3 or 6, or parallel.pipe = 4"),
    (
        {"model": GQA, "parallel": {"tensor": 4}},
        4,
        "parallel.tensor = 4 does not fit model.num_kv_heads = 3 → use 1, 3, 6 or 12, or parallel.pipe = 4",
    ),
    (
        {"model": SMOLLM2, "parallel": {"tensor": 2}},
        2,
        "parallel.tensor = 2 does not divide model.num_heads = 9 → use 1 or 3, or parallel.pipe = 2",
    ),
    ({"parallel": {"tensor": 4, "zero_stage": 2}}, 4, "parallel.tensor = 4 does not divide model.num_heads = 6 → use 1, 2, 3 or 6"),
    ({"parallel": {"tensor": 4, "pipe": 2}}, 8, "parallel.tensor = 4 does not divide model.num_heads = 6 → use 1, 2, 3 or 6"),
    ({"model": {"ffn_size": 500}, "parallel": {"tensor": 3}}, 3, "parallel.tensor = 3 does not divide model.ffn_size = 500 → use 1 or 2"),
    (
        {"model": {"seq_length": 129}, "parallel": {"tensor": 2, "sequence": True}},
        2,
        "parallel.tensor = 2 does not divide model.seq_length = 129 → use 1 or 3, or parallel.sequence False",
    ),
    (
        {"schedule": {"length_ramp": (32, 5, 100)}},
        1,
        "schedule.length_ramp = 32 5 100 does not lead to model.seq_length = 128: 128 − 32 = 96 is no positive multiple of 5 → "
        "use a start such as 3",
    ),
    (
        {"schedule": {"length_ramp": (5, 3, 1000)}, "parallel": {"tensor": 2, "sequence": True}},
        2,
        "schedule.length_ramp has sequences of 5 tokens, which parallel.tensor = 2 does not divide → "
        "use a start and an increment that are multiples of 2, or parallel.sequence False",
    ),
    (
        {"profile": Profile(steps="299-301")},
        1,
        "profile.steps = '299-301' goes beyond the last step, schedule.steps = 300 → use 299-300",
    ),
    (
        {"profile": Profile(steps="500-502")},
        1,
        "profile.steps = '500-502' goes beyond the last step, schedule.steps = 300 → use steps up to 300",
    ),
    ({"parallel": {"pipe": 5}}, 5, "parallel.pipe = 5 leaves stages without a block of model.num_layers = 4 → use pipe 4 or fewer"),
    (
        {"parallel": {"pipe": 2, "zero_stage": 2}},
        2,
        "parallel.zero_stage = 2 does not work with parallel.pipe = 2 → use zero_stage 1, or pipe 1",
    ),
    (
        {"parallel": {"pipe": 2, "offload_optimizer": True}},
        2,
        "parallel.offload_optimizer = True does not work with parallel.pipe = 2 → use offload_optimizer False, or pipe 1",
    ),
    (
        {"parallel": {"offload_optimizer": True}},
        1,
        "parallel.offload_optimizer = True does not work with parallel.zero_stage = 1 → use zero_stage 2 or 3, or offload_optimizer False",
    ),
    (
        {"parallel": {"offload_parameters": True, "zero_stage": 2}},
        1,
        "parallel.offload_parameters = True does not work with parallel.zero_stage = 2 → use zero_stage 3, or offload_parameters False",
    ),
    (
        {"parallel": {"tensor": 2}},
        1,
        "parallel.pipe × parallel.tensor = 1 × 2 = 2 needs 2 ranks, the world has 1 → add `--num_gpus 2` to the deepspeed command",
    ),
    (
        {"parallel": {"tensor": 2}},
        3,
        "parallel.pipe × parallel.tensor = 1 × 2 = 2 does not divide the world of 3 ranks → add `--num_gpus 4` to the deepspeed command",
    ),
    (
        {},
        3,
        "schedule.batch_size = 16 is not a multiple of schedule.micro_batch_size × data ranks = 8 × 3 = 24 → use batch_size 24",
    ),
    (
        {},
        4,
        "schedule.batch_size = 16 is not a multiple of schedule.micro_batch_size × data ranks = 8 × 4 = 32 → "
        "use batch_size 32, or micro_batch_size 1, 2 or 4",
    ),
    (
        {"schedule": SMALL},
        1,
        "optimizer.warmup_steps = 30 is more than schedule.steps = 10 → use 10 or fewer warm-up steps",
    ),
    (
        {"optimizer": {"decay": "wsd"}},
        1,
        "optimizer.decay = 'wsd' needs optimizer.decay_steps → set it, for example to 60 of 300 steps",
    ),
    (
        {"optimizer": {"decay_steps": 5}},
        1,
        "optimizer.decay_steps = 5 has no effect with optimizer.decay = 'cosine' → leave it out (None), or use decay 'wsd'",
    ),
    (
        {"optimizer": {"decay": "wsd", "decay_steps": 280}},
        1,
        "optimizer.warmup_steps + optimizer.decay_steps = 30 + 280 is more than schedule.steps = 300 → make the three fit",
    ),
]


@pytest.mark.parametrize(("groups", "world", "said"), CASES)
def test_what_cannot_work_is_one_sentence(groups: dict, world: int, said: str) -> None:
    assert sentence(lambda: check(example(**groups), ranks(world))) == said


@pytest.mark.parametrize(
    ("launcher", "nodes", "said"),
    [
        ("python", 1, "launch with `deepspeed --num_gpus 4`"),
        ("torchrun", 1, "add `--nproc_per_node 4` to the torchrun command"),
        ("srun", 1, "add `--ntasks-per-node 4` to the srun command"),
        ("deepspeed", 2, "add `--num_gpus 2` to the deepspeed command"),
    ],
)
def test_the_way_out_is_in_the_words_of_the_launcher(launcher: str, nodes: int, said: str) -> None:
    experiment = example(parallel={"pipe": 2, "tensor": 2})
    assert sentence(lambda: check(experiment, ranks(nodes, launcher, nodes))).endswith(f"→ {said}")


def test_the_way_out_works() -> None:
    """The advised number of ranks passes the very check that refused."""
    for world, pipe, tensor in itertools.product(range(1, 9), (1, 2, 4), (1, 2, 3)):
        experiment = example(parallel={"pipe": pipe, "tensor": tensor}, schedule={"micro_batch_size": 1, "batch_size": 840})
        if world % (pipe * tensor):
            advised = int(sentence(lambda e=experiment, w=world: check(e, ranks(w))).rpartition("--num_gpus ")[2].split("`")[0])
            assert advised > world
            check(experiment, ranks(advised))
        else:
            check(experiment, ranks(world))


def test_whole_activations_take_sequences_of_any_length() -> None:
    check(example(schedule={"length_ramp": (5, 3, 1000)}, parallel={"tensor": 2}), ranks(2))
    check(example(schedule={"length_ramp": (6, 2, 1000)}, parallel={"tensor": 2, "sequence": True}), ranks(2))


def test_zero_stage_0_runs_as_1() -> None:
    assert [effective_zero_stage(Parallel(zero_stage=stage)) for stage in (0, 1, 2, 3)] == [1, 1, 2, 3]
    check(example(parallel={"zero_stage": 0, "pipe": 2}), ranks(2))


def test_layout_arithmetic_adds_up() -> None:
    """Every sequence of a step is passed once by one data rank, whatever the layout."""
    for pipe, tensor, data, micro in itertools.product((1, 2), (1, 2), (1, 2, 4), (1, 2, 4)):
        experiment = example(parallel={"pipe": pipe, "tensor": tensor}, schedule={"micro_batch_size": micro})
        world = pipe * tensor * data
        check(experiment, ranks(world))
        found = layout(experiment, world)
        assert (found.pipe, found.data, found.tensor, found.world) == (pipe, data, tensor, world)
        assert found.micro_batches * micro * data == 16
        assert found.tokens_per_step == 16 * 128
