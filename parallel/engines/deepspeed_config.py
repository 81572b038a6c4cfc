"""Derives the DeepSpeed configuration (ds_config) from an experiment's fields. Imports neither torch nor DeepSpeed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parallel.errors import Mistake

STATE_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
"""What an optimizer may call a tensor that it keeps per parameter. Checkpoints name tensors and files by it."""
BUCKET_ELEMENTS = {"cpu": 5_000_000, "cuda": 50_000_000}
"""Device -> elements of a communication bucket. DeepSpeed's own, 5e8, may be allocated whole at each step; 5e6 are too few for NCCL's
rings to reach their bandwidth. In fp32, 5e7 take 200 MB, and with `overlap_comm` there are two buckets."""
BY_DEVICE = 0
"""As `bucket_elements`: the number that BUCKET_ELEMENTS has for the device."""

SAME = {
    "train_micro_batch_size_per_gpu": "schedule.micro_batch_size",
    "gradient_clipping": "optimizer.clip",
    "optimizer.params.lr": "optimizer.lr",
    "optimizer.params.betas": "optimizer.betas",
    "optimizer.params.eps": "optimizer.eps",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
}
"""Keys whose value is a field of the experiment, unchanged -> the field."""

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
"""Keys, or tables of keys, that a field of the experiment determines -> the field. Not all are always derived. The rest is fixed."""


@dataclass(frozen=True)
class EngineSettings:
    """The fields of an experiment that an engine needs, by the experiment's own names."""

    precision: str
    zero_stage: int
    micro_batch_size: int
    micro_batches: int
    clip: float
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    optimizer_class: type | None = None
    """None for AdamW, which DeepSpeed creates. Another is created as Class(parameter groups, lr=…, betas=…, eps=…, weight_decay=…)."""
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket_elements: int = BY_DEVICE
    """Elements of a bucket in which gradients are reduced and weights gathered. It changes speed and memory only."""
    explicit: Mapping[str, Any] = field(default_factory=dict)
    """The experiment's own `deepspeed={…}` table, merged last."""


def derive(settings: EngineSettings, cuda: bool) -> dict[str, Any]:
    """The whole DeepSpeed configuration. An explicit key that contradicts a derived one raises a Mistake that names both."""
    optimizer = {
        "lr": settings.lr,
        "betas": list(settings.betas),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
        "torch_adam": True,  # DeepSpeed's own Adams are compiled on first use
        "fused": True,  # torch's fused kernel is several times faster than its for-loop
    }
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.micro_batches,
        "gradient_clipping": settings.clip,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "zero_optimization": _zero(settings, cuda),
        "zero_allow_untested_optimizer": True,
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False},
    }
    if settings.optimizer_class is None:
        derived["optimizer"] = {"type": "AdamW", "params": optimizer}
    else:
        derived["zero_force_ds_cpu_optimizer"] = False  # with offload, DeepSpeed otherwise accepts no optimizer but its own
    # Gradients are accumulated and communicated in fp32, or the layout would change the sums.
    if settings.precision != "fp32":
        name = {"bf16": "bf16", "fp16": "fp16"}[settings.precision]
        derived |= {name: {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return merge(derived, settings.explicit)


def _zero(settings: EngineSettings, cuda: bool) -> dict[str, Any]:
    bucket = settings.bucket_elements or BUCKET_ELEMENTS["cuda" if cuda else "cpu"]
    zero: dict[str, Any] = {
        "stage": max(1, settings.zero_stage),  # at stage 0 the gradient norm is wrong or missing: docs/deepspeed.md
        "overlap_comm": cuda,
        "contiguous_gradients": cuda,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    return zero


def merge(derived: Mapping[str, Any], explicit: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """`derived` with the keys of `explicit` added, table by table. A key with two values raises a Mistake naming the field to set."""
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
            raise Mistake(f"deepspeed.{here} = {value!r} contradicts {_origin(here, merged[key])}")
    return merged


def _origin(key: str, value: Any) -> str:
    """Where the derived value of `key` comes from, and what to do: 'optimizer.clip = 1.0 → set optimizer.clip instead'."""
    if key in SAME:
        return f"{SAME[key]} = {value!r} → set {SAME[key]} instead"
    for table in (key, key.rpartition(".")[0]):
        if table in OWNED:
            return f"{value!r}, which follows from {OWNED[table]} → set {OWNED[table]} instead"
    return f"{value!r}, which no setting changes → leave deepspeed.{key} out"
