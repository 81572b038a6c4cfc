"""The DeepSpeed configuration: derived from fields, extended by the user's own table, never contradicted by it."""

import json
from dataclasses import replace

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from parallel.engines.deepspeed_config import OWNED, SAME, EngineSettings, derive, merge
from parallel.errors import Mistake

SETTINGS = EngineSettings(
    precision="bf16", zero_stage=2, micro_batch_size=4, micro_batches=3, clip=0.7, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
)


def deepspeeds_reading(**changes) -> DeepSpeedConfig:
    """What DeepSpeed itself understands of the derived JSON."""
    return DeepSpeedConfig(json.loads(json.dumps(derive(replace(SETTINGS, **changes), cuda=False))))


def test_deepspeed_reads_what_the_fields_say() -> None:
    read = deepspeeds_reading()
    assert read.train_micro_batch_size_per_gpu == 4 and read.gradient_accumulation_steps == 3 and read.gradient_clipping == 0.7
    assert read.zero_optimization_stage == 2 and read.bfloat16_config.enabled and not read.float16_config.enabled
    assert read.optimizer_name == "adamw" and read.optimizer_params["weight_decay"] == 0.1 and read.optimizer_params["eps"] == 1e-8
    assert read.grad_accum_dtype == "fp32" and "fp32" in str(read.communication_data_type).replace("float32", "fp32")
    assert read.pipeline["pipe_partitioned"] is False and read.pipeline["grad_partitioned"] is False


@pytest.mark.parametrize(("precision", "bf16", "fp16"), [("fp32", False, False), ("bf16", True, False), ("fp16", False, True)])
def test_deepspeed_reads_the_precision(precision: str, bf16: bool, fp16: bool) -> None:
    read = deepspeeds_reading(precision=precision)
    assert (read.bfloat16_config.enabled, read.float16_config.enabled) == (bf16, fp16)


@pytest.mark.parametrize(("asked", "run"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_stage_zero_runs_as_one(asked: int, run: int) -> None:
    assert deepspeeds_reading(zero_stage=asked).zero_optimization_stage == run


def test_offload_is_derived_where_asked_for() -> None:
    none = deepspeeds_reading(zero_stage=3).zero_config
    both = deepspeeds_reading(zero_stage=3, offload_optimizer=True, offload_parameters=True).zero_config
    assert none.offload_optimizer is None and none.offload_param is None
    assert both.offload_optimizer.device == "cpu" and both.offload_param.device == "cpu"


def test_the_users_table_is_merged_last() -> None:
    own = {"wall_clock_breakdown": False, "zero_optimization": {"reduce_scatter": False}, "memory_breakdown": True}
    merged = derive(replace(SETTINGS, explicit=own), cuda=False)
    assert merged["memory_breakdown"] is True and merged["zero_optimization"]["reduce_scatter"] is False
    plain = derive(SETTINGS, cuda=False)
    assert merged["zero_optimization"] | {"reduce_scatter": None} == plain["zero_optimization"] | {"reduce_scatter": None}
    assert set(merged) == {*plain, "memory_breakdown"}


@pytest.mark.parametrize(
    ("explicit", "names"),
    [
        (
            {"zero_optimization": {"stage": 3}},
            ["deepspeed.zero_optimization.stage = 3", "contradicts 2, which follows from parallel.zero_stage → set parallel.zero_stage"],
        ),
        ({"gradient_clipping": 1.0}, ["deepspeed.gradient_clipping = 1.0", "contradicts optimizer.clip = 0.7 → set optimizer.clip"]),
        (
            {"optimizer": {"params": {"lr": 0.1}}},
            ["deepspeed.optimizer.params.lr = 0.1", "contradicts optimizer.lr = 0.001 → set optimizer.lr"],
        ),
        ({"optimizer": "Adam"}, ["deepspeed.optimizer = 'Adam'", "AdamW", "→ leave deepspeed.optimizer out"]),
        (
            {"bf16": {"enabled": False}},
            ["deepspeed.bf16.enabled = False", "contradicts True, which follows from precision → set precision"],
        ),
        ({"fp16": {"enabled": True}}, ["deepspeed.fp16 = ", "contradicts precision"]),
        ({"train_batch_size": 64}, ["deepspeed.train_batch_size = 64", "contradicts schedule.batch_size"]),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            ["deepspeed.zero_optimization.offload_param", "parallel.offload_parameters"],
        ),
        ({"scheduler": {"type": "WarmupLR"}}, ["deepspeed.scheduler", "optimizer.decay"]),
    ],
)
def test_a_contradiction_names_both(explicit: dict, names: list[str]) -> None:
    with pytest.raises(Mistake) as refused:
        derive(replace(SETTINGS, explicit=explicit), cuda=False)
    assert all(name in str(refused.value) for name in names) and "→" in str(refused.value), str(refused.value)


DECIDED_BY = {
    "train_micro_batch_size_per_gpu": "schedule.micro_batch_size",
    "gradient_accumulation_steps": "schedule.batch_size",
    "gradient_clipping": "optimizer.clip",
    "optimizer.params.lr": "optimizer.lr",
    "optimizer.params.betas": "optimizer.betas",
    "optimizer.params.eps": "optimizer.eps",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer.device": "parallel.offload_optimizer",
    "zero_optimization.offload_optimizer.pin_memory": "parallel.offload_optimizer",
    "zero_optimization.offload_param.device": "parallel.offload_parameters",
    "zero_optimization.offload_param.pin_memory": "parallel.offload_parameters",
    "bf16.enabled": "precision",
}


def leaves(table: dict, path: str = "") -> list[str]:
    """The dotted names of all values that are no tables."""
    deeper = ((f"{path}{key}", value) for key, value in table.items())
    return [name for here, value in deeper for name in (leaves(value, f"{here}.") if isinstance(value, dict) else [here])]


WHOLE = replace(SETTINGS, zero_stage=3, offload_optimizer=True, offload_parameters=True)


@pytest.mark.parametrize("key", leaves(derive(WHOLE, cuda=False)))
def test_a_contradiction_of_any_derived_key_names_it_and_its_field(key: str) -> None:
    explicit: object = "something else"
    for part in reversed(key.split(".")):
        explicit = {part: explicit}
    with pytest.raises(Mistake) as refused:
        derive(replace(WHOLE, explicit=explicit), cuda=False)
    told = str(refused.value)
    assert told.startswith(f"deepspeed.{key} = 'something else' contradicts ")
    assert told.endswith(
        f"→ set {DECIDED_BY[key]} instead" if key in DECIDED_BY else f"which no setting changes → leave deepspeed.{key} out"
    )


def test_every_key_that_a_field_decides_is_derived() -> None:
    assert set(DECIDED_BY) <= set(leaves(derive(WHOLE, cuda=False)))


def test_the_same_value_is_no_contradiction_and_nothing_is_written_back() -> None:
    derived, explicit = {"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"d": 3}}
    assert merge(derived, explicit) == {"a": 1, "b": {"c": 2, "d": 3}}
    assert derived == {"a": 1, "b": {"c": 2}} and explicit == {"a": 1, "b": {"d": 3}}


def test_owned_keys_belong_to_fields_that_exist() -> None:
    from research.config import Optimizer, Parallel, Schedule

    fields = {"schedule": Schedule, "optimizer": Optimizer, "parallel": Parallel}
    for field in (OWNED | SAME).values():
        section, _, name = field.partition(".")
        assert not name or name in fields[section].model_fields, field
