"""Corrections of DeepSpeed 0.19.8's fp16 and bf16 optimizers: loss scale per layout, its time of change, skipped steps.

Each effect is measured in tests/parallel/engines/test_fp16.py; docs/deepspeed.md describes what happens without the corrections.
Nothing here communicates.
"""

from typing import Any


def correct(optimizer: Any, precision: str, data: int) -> None:
    """Applies the corrections for `precision` to DeepSpeed's optimizer on one of `data` data ranks. Call once, before the first step."""
    if precision == "fp16":
        divide_scale_by_data_ranks(optimizer, data)
        change_scale_after_step(optimizer)
    if precision in ("fp16", "bf16") and getattr(optimizer, "cpu_offload", False):
        forget_skipped_step(optimizer)


def divide_scale_by_data_ranks(optimizer: Any, data: int) -> None:
    """Gives the loss scale, static or dynamic, the same meaning on every layout.

    Engines average gradients over data ranks after the backward pass, so token weights are multiplied by the number of data ranks
    before it (research/data/batches.py): at equal scales, two data ranks overflow fp16 where one does not. With the scale divided, a
    token's gradient enters the backward pass multiplied by the same number on every layout; the division by the scale follows in
    fp32, after the sum. Micro-batches need no correction: both engines divide by their number before the backward pass.
    """
    scaler = optimizer.loss_scaler
    scaler.cur_scale /= data
    if scaler.dynamic:
        scaler.min_scale /= data


def change_scale_after_step(optimizer: Any) -> None:
    """Changes the loss scale at the end of `optimizer.step` instead of in its middle; the rule is DeepSpeed's own.

    If it changes in the middle, the gradients of a step after which the scale doubles are divided by twice the factor that they were
    multiplied by: half the update wherever clipping does not bind, and half the norm under ZeRO-3.
    """
    update, step = optimizer._update_scale, optimizer.step

    def whole_step(*arguments: Any, **settings: Any) -> Any:
        result = step(*arguments, **settings)
        update(optimizer.overflow)
        return result

    optimizer._update_scale = lambda has_overflow=False: None
    optimizer.step = whole_step


def forget_skipped_step(optimizer: Any) -> None:
    """Clears the accumulated gradients of a skipped step, which ZeRO-2 with an offloaded optimizer keeps.

    Otherwise the next step's gradients are added to values that are not finite, and every later step is skipped too.
    """
    step = optimizer.step

    def clean_step(*arguments: Any, **settings: Any) -> Any:
        result = step(*arguments, **settings)
        if optimizer.overflow:
            optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
        return result

    optimizer.step = clean_step
