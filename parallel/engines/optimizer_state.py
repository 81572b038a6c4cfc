"""Reads and sets the optimizer state of a DeepSpeed engine on any ZeRO stage: fp32 weights, Adam's moments, counters, loss scale.

Every engine keeps, on each data rank, an interval of each parameter's flattened slice in fp32. Stages 1 and 2 cut the concatenation
of all parameters into equal shares, so that most parameters lie whole on one rank; stage 3 cuts every parameter into equal shares.
Both are a Fragment here, and neither reading nor setting needs a whole tensor. Fragments are found through DeepSpeed 0.19.8's own
links (`_hp_mapping`, `_z3_optimizer`), which its `safe_get_full_*` use too; those sum over zeros, which turns −0.0 into 0.0.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel.engines.deepspeed_config import STATE_NAME
from parallel.engines.engine import Engine
from parallel.errors import Mistake, listed

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's two moments, by torch's names. The first kind of state of a parameter is its fp32 "weights"."""
STATE_NAMES = "state_names"
"""The attribute in which another optimizer's class names the tensors that it keeps per parameter, of the parameter's shape."""
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""The state of fp16's dynamic loss scaler; its window and its factor are settings."""


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + len(values)) of a parameter's flattened slice. `values`, 'n' in fp32, is the optimizer's own memory."""

    start: int
    values: Tensor


def kinds_of(engine: Engine) -> tuple[str, ...]:
    """The tensors that a checkpoint holds of every parameter: its fp32 "weights", then the optimizer's state by its own names."""
    return ("weights", *state_names_of(type(engine.optimizer.optimizer)))


def state_names_of(optimizer: type) -> tuple[str, ...]:
    """The tensors that an optimizer's class says it keeps per parameter; a Mistake if it does not say so in a usable form."""
    names = getattr(optimizer, STATE_NAMES, MOMENTS if issubclass(optimizer, torch.optim.AdamW) else None)
    if not isinstance(names, tuple) or not all(isinstance(name, str) and STATE_NAME.fullmatch(name) for name in names):
        raise Mistake(
            f"the optimizer {optimizer.__name__} does not say what it keeps per parameter → give the class an attribute such as "
            f"{STATE_NAMES} = {MOMENTS[:1]}, names of lower-case letters, or ()"
        )
    if len(set(names)) < len(names) or set(names) & {"weights", "step"}:
        raise Mistake(
            f"{STATE_NAMES} = {names} of the optimizer {optimizer.__name__} → name each tensor once, and none of them weights or step, "
            "which every checkpoint holds"
        )
    return names


def fragment(parameter: nn.Parameter, kind: str) -> Fragment:
    """The part of a parameter's `kind` (one of `kinds_of` the engine) that this rank's optimizer holds: a view, possibly empty.

    The moments exist after `ensure_moments`.
    """
    key = None if kind == "weights" else kind
    # ZeRO-3: equal shares, the last ones padded behind the parameter's end.
    if hasattr(parameter, "ds_id"):
        optimizer = parameter._z3_optimizer
        values, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=True, optim_state_key=key)
        start = min(values.numel() * optimizer._get_param_partition_rank(parameter), parameter.ds_numel)
        return Fragment(start, values.detach()[: parameter.ds_numel - start])
    # ZeRO-1 and 2: a link to this rank's share, None if no element of the parameter lies in it.
    mapping = parameter._hp_mapping
    if mapping is None:
        return Fragment(0, torch.empty(0))
    return Fragment(mapping.lp_fragment_address.start, mapping.get_hp_fragment(key).detach())


def ensure_moments(engine: Engine) -> None:
    """Creates the optimizer's state as its first step would, all zero, if there has been none, and links parameters to their parts.

    A Mistake if the optimizer keeps other state than its class says: a checkpoint would lack it. All ranks' optimizers keep the same.
    """
    inner, names = engine.optimizer.optimizer, kinds_of(engine)[1:]
    for flat in _flat_partitions(engine):
        if kept := inner.state.get(flat):
            if set(kept) - {"step"} != set(names):
                raise Mistake(
                    f"the optimizer {type(inner).__name__} keeps {listed(sorted(set(kept) - {'step'}), 'and') or 'nothing'} per parameter, "
                    f"but says {listed(sorted(names), 'and') or 'nothing'} → let {STATE_NAMES} name exactly what it keeps, which must be "
                    "tensors of the parameter's shape"
                )
        else:
            step = torch.zeros((), dtype=torch.float32, device=flat.device if inner.defaults.get("fused") else "cpu")
            inner.state[flat] = {"step": step, **{key: torch.zeros_like(flat).detach() for key in names}}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # Stages 1 and 2 link each parameter to its part of the state after the step of the first group, when the second has no
        # state yet: the second group's parameters would never be linked (DeepSpeed 0.19.8).
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _flat_partitions(engine: Engine) -> Iterator[Tensor]:
    """The flat fp32 tensors that torch's AdamW updates. Each is a key of its state."""
    stage_3_groups = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    if stage_3_groups is not None:
        yield from stage_3_groups
    else:
        yield from (flat for group in engine.optimizer.param_groups for flat in group["params"])


def publish_weights(engine: Engine) -> None:
    """Rounds the fp32 weights into the parameters that the model computes with, on all data ranks, as the end of a step does.

    Collective over the data group.
    """
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()  # small parameters stay whole between steps: gathers them again


def counters(engine: Engine) -> dict[str, Any]:
    """The engine's counters, equal on every rank; call `ensure_moments` first.

    {"steps": attempted, "skipped_steps": …, "adam_steps": applied, "loss_scaler": {} unless fp16}.
    """
    steps = {int(engine.optimizer.optimizer.state[flat].get("step", 0)) for flat in _flat_partitions(engine)}
    if len(steps) != 1:
        raise RuntimeError(f"the optimizer has taken {sorted(steps)} steps on the parts of one rank, where all take the same number")
    scaler = _dynamic_scaler(engine)
    return {
        "steps": int(engine.deepspeed.global_steps),
        "skipped_steps": int(engine.deepspeed.skipped_steps),
        "adam_steps": steps.pop(),
        "loss_scaler": {name: getattr(scaler, name) for name in SCALER} | {"cur_scale": engine.loss_scale} if scaler else {},
    }


def set_counters(engine: Engine, saved: dict[str, Any]) -> None:
    """Sets what `counters` returned. Micro-steps and samples are derived from the steps, so that the accumulation may differ.

    A loss scale is set if both runs have a dynamic one; a run that changes to fp16 begins with its own.
    """
    deepspeed = engine.deepspeed
    deepspeed.global_steps, deepspeed.skipped_steps = saved["steps"], saved["skipped_steps"]
    if engine.grid.pipe == 1:  # the pipeline engine does not count micro-steps
        deepspeed.micro_steps = saved["steps"] * deepspeed.gradient_accumulation_steps()
    deepspeed.global_samples = saved["steps"] * deepspeed.train_batch_size()
    for flat in _flat_partitions(engine):
        state = engine.optimizer.optimizer.state[flat]
        if "step" in state:
            state["step"].fill_(saved["adam_steps"])
    scaler = _dynamic_scaler(engine)
    if scaler and saved["loss_scaler"]:
        for name, value in saved["loss_scaler"].items():
            setattr(scaler, name, value)
        scaler.cur_scale /= engine.grid.data  # saved as Engine.loss_scale, which is the same on every layout


def check_counters(saved: Any) -> dict[str, Any]:
    """Returns `saved` if it has the form that `counters` returns; raises a Mistake otherwise."""
    saved = saved if isinstance(saved, dict) else {}
    for name in ("steps", "skipped_steps", "adam_steps"):
        if not (_is_number(saved.get(name)) and isinstance(saved[name], int) and 0 <= saved[name] < 2**24):  # Adam counts in fp32
            raise Mistake(f"the checkpoint's counters hold no {name} that is a number of steps → use another checkpoint of the run")
    scaler = saved.get("loss_scaler")
    if not isinstance(scaler, dict) or set(scaler) not in (set(), set(SCALER)) or not all(map(_is_number, scaler.values())):
        raise Mistake(f"the checkpoint's counters hold no loss_scaler with {', '.join(SCALER)} → use another checkpoint of the run")
    if scaler and not scaler["cur_scale"] > 0:
        raise Mistake(f"the checkpoint's loss scale is {scaler['cur_scale']} → use another checkpoint of the run")
    return saved


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _dynamic_scaler(engine: Engine) -> Any:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if scaler is not None and scaler.dynamic else None
