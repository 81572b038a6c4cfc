"""The DeepSpeed JSON, derived from an experiment's fields. Imports neither torch nor DeepSpeed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parallel.errors import Mistake

BUCKET_ELEMENTS = 5_000_000
"""Elements a communication bucket holds; DeepSpeed's 5e8 may be allocated whole at each step."""

SAME = {
    "train_micro_batch_size_per_gpu": "schedule.micro_batch_size",
    "gradient_clipping": "optimizer.clip",
    "optimizer.params.lr": "optimizer.lr",
    "optimizer.params.betas": "optimizer.betas",
    "optimizer.params.eps": "optimizer.eps",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
}
"""Keys that hold a field of the experiment as it is."""

OWNED = {
    "train_batch_size": "schedule.batch_size",
    "gradient_accumulation_steps": "schedule.batch_size",
    "zero_optimization.stage": "parallel.zero_stage",
    "scheduler": "optimizer.decay",
    "bf16": "precision",
    "fp16": "precision",
    "amp": "precision",
    "tensor_parallel": "parallel.tensor",
    "zero_optimization.offload_optimizer": "parallel.offload_optimizer",
    "zero_optimization.offload_param": "parallel.offload_parameters",
}
"""Keys, or tables of them, that a field of the experiment decides; not all are always derived. The rest is Tessera's own choice."""


@dataclass(frozen=True)
class EngineSettings:
    """All that an engine needs to know of an experiment, by the experiment's own names."""

    precision: str
    zero_stage: int
    micro_batch_size: int
    micro_batches: int
    clip: float
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    offload_optimizer: bool = False
    offload_parameters: bool = False
    explicit: Mapping[str, Any] = field(default_factory=dict)
    """The experiment's own `deepspeed={…}` table, merged last."""


def derive(settings: EngineSettings, cuda: bool) -> dict[str, Any]:
    """The whole DeepSpeed configuration. An explicit key that contradicts a derived one is a Mistake naming both."""
    derived = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.micro_batches,
        "gradient_clipping": settings.clip,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "optimizer": _optimizer(settings),
        "zero_optimization": _zero(settings, cuda),
        "zero_allow_untested_optimizer": True,
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False},
        **_precision(settings),
    }
    return merge(derived, settings.explicit)


def _optimizer(settings: EngineSettings) -> dict[str, Any]:
    # torch_adam: DeepSpeed's own Adams are compiled on first use. fused: torch's, several times faster than its for-loop.
    parameters = {
        "lr": settings.lr,
        "betas": list(settings.betas),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
        "torch_adam": True,
        "fused": True,
    }
    return {"type": "AdamW", "params": parameters}


def _zero(settings: EngineSettings, cuda: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": max(1, settings.zero_stage),  # stage 0 has a wrong norm or none: docs/deepspeed.md
        "overlap_comm": cuda,
        "contiguous_gradients": cuda,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    return zero


def _precision(settings: EngineSettings) -> dict[str, Any]:
    if settings.precision == "fp32":
        return {}
    name = {"bf16": "bf16", "fp16": "fp16"}[settings.precision]
    # Gradients are accumulated and communicated in fp32, or the layout would change the sums.
    return {name: {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


def merge(derived: Mapping[str, Any], explicit: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """`derived` with the keys of `explicit` added, table by table; a key with two values is refused, naming the field that decides it."""
    merged = dict(derived)
    for key, value in explicit.items():
        here = f"{path}{key}"
        if key not in merged and here in OWNED:
            raise Mistake(f"deepspeed.{here} = {value!r} contradicts {OWNED[here]}, which decides it → set {OWNED[here]} instead")
        if key not in merged:
            merged[key] = value
        elif isinstance(merged[key], Mapping) and isinstance(value, Mapping):
            merged[key] = merge(merged[key], value, f"{here}.")
        elif merged[key] != value:
            raise Mistake(f"deepspeed.{here} = {value!r} contradicts {_whose(here, merged[key])}")
    return merged


def _whose(key: str, value: Any) -> str:
    """'optimizer.clip = 1.0 → set optimizer.clip instead': where the derived value of `key` is from, and what to do."""
    if key in SAME:
        return f"{SAME[key]} = {value!r} → set {SAME[key]} instead"
    for table in (key, key.rpartition(".")[0]):
        if table in OWNED:
            return f"{value!r}, which follows from {OWNED[table]} → set {OWNED[table]} instead"
    return f"{value!r}, which no setting changes → leave deepspeed.{key} out"
