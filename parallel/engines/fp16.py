"""An optimizer step in fp16 or bf16 as DeepSpeed 0.19.8 should do it, by small corrections of its optimizers from outside.

Seen and measured in tests/parallel/engines/test_fp16.py; docs/deepspeed.md says what happens without them. Nothing here communicates.
"""

from typing import Any


def correct(optimizer: Any, precision: str, data: int) -> None:
    """Applies what `precision` needs to DeepSpeed's optimizer of one of `data` data ranks. Once, before the first step."""
    if precision == "fp16":
        divide_scale_by_data_ranks(optimizer, data)
        change_scale_after_step(optimizer)
    if precision in ("fp16", "bf16") and getattr(optimizer, "cpu_offload", False):
        forget_skipped_step(optimizer)


def divide_scale_by_data_ranks(optimizer: Any, data: int) -> None:
    """Makes the loss scale, static or dynamic, mean the same on every layout.

    Engines average gradients over data ranks after the backward pass, so token weights carry the number of data ranks before it
    (research/data/batches.py): at one scale, two data ranks overflow fp16 where one does not. With the scale divided, a token's
    gradient enters the backward pass multiplied by the same number on every layout, and what makes up for it, the division by the
    scale, comes in fp32 after the sum. (Micro-batches need nothing: both engines divide by their number before the backward pass.)
    """
    scaler = optimizer.loss_scaler
    scaler.cur_scale /= data
    if scaler.dynamic:
        scaler.min_scale /= data


def change_scale_after_step(optimizer: Any) -> None:
    """Lets the loss scale grow or shrink at the end of `optimizer.step`, not in its middle; by DeepSpeed's rule.

    In its middle, the gradients of a step after which the scale doubles are divided by twice what they were multiplied by: half an
    update wherever clipping does not bind, and half a norm from ZeRO-3.
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

    The next step's would be added to what was not finite, and so every later step skipped.
    """
    step = optimizer.step

    def clean_step(*arguments: Any, **settings: Any) -> Any:
        result = step(*arguments, **settings)
        if optimizer.overflow:
            optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
        return result

    optimizer.step = clean_step
