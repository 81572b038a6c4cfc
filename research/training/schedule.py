"""The learning-rate schedule: a pure function of the step, first a warm-up and then a decay. It has no state to save or resume.

Steps count from 0; `step` is the step about to be taken and `steps` how many the run takes, so the last one is steps - 1.

- **Warm-up** (step < warmup_steps): lr · (step + 1) / warmup_steps. It reaches lr exactly at step warmup_steps - 1, the *peak*;
  with warmup_steps = 0 the peak is step 0.
- **Decay** (step > peak): the function named by `optimizer.decay`. An experiment may name a function of its
  own (`variant:Name`). linear, cosine and wsd are min_lr exactly at the last step;
  inverse_sqrt never falls below min_lr; constant stays at lr. A run that ends before its peak has no decay.

With min_lr = 0 and warmup_steps ≥ 1, `learning_rate(step)` is what transformers' schedulers give after step + 1 scheduler
steps: theirs spend the first step at 0 and never take the one at the end of the decay.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from models.config import chosen
from parallel.errors import Mistake
from research.config import Optimizer


def learning_rate(step: int, optimizer: Optimizer, steps: int, variants: Mapping[str, Any] = MappingProxyType({})) -> float:
    """The learning rate of step `step` (from 0) in a run of `steps` steps. Steps past the last get the last one's rate.

    `variants`: what the experiment names of its variant.py. A decay of its own is a function with the arguments of those below.
    """
    if step < optimizer.warmup_steps:
        return optimizer.lr * ((step + 1) / optimizer.warmup_steps)
    decay = chosen("optimizer.decay", optimizer.decay, DECAYS, variants)
    return float(decay(min(step, steps - 1), optimizer, steps))


def constant(step: int, optimizer: Optimizer, steps: int) -> float:
    """lr at every step; min_lr plays no part."""
    return optimizer.lr


def linear(step: int, optimizer: Optimizer, steps: int) -> float:
    """A straight line from lr at the peak to min_lr at the last step."""
    return _between(optimizer, 1 - _progress(step, _peak(optimizer), steps))


def cosine(step: int, optimizer: Optimizer, steps: int) -> float:
    """Half a cosine from lr at the peak to min_lr at the last step (arXiv:1608.03983, without restarts)."""
    return _between(optimizer, 0.5 * (1 + math.cos(math.pi * _progress(step, _peak(optimizer), steps))))


def wsd(step: int, optimizer: Optimizer, steps: int) -> float:
    """Warmup-stable-decay (arXiv:2404.06395): lr until decay_steps before the last step, then a straight line to min_lr."""
    if optimizer.decay_steps is None:
        raise Mistake("optimizer.decay = 'wsd' needs optimizer.decay_steps → set it, for example to a fifth of schedule.steps")
    start = max(_peak(optimizer), steps - 1 - optimizer.decay_steps)
    return _between(optimizer, 1 - _progress(step, start, steps))


def inverse_sqrt(step: int, optimizer: Optimizer, steps: int) -> float:
    """lr · √(w / (step + 1)) with w = max(1, warmup_steps), at least min_lr (arXiv:1706.03762; it does not depend on `steps`)."""
    return max(optimizer.min_lr, optimizer.lr * math.sqrt(max(1, optimizer.warmup_steps) / (step + 1)))


DECAYS: dict[str, Callable[[int, Optimizer, int], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
    "inverse_sqrt": inverse_sqrt,
}


def _peak(optimizer: Optimizer) -> int:
    """The step at which warm-up has reached lr."""
    return max(0, optimizer.warmup_steps - 1)


def _progress(step: int, start: int, steps: int) -> float:
    """0 up to step `start`, 1 at the last step, straight between; 0 where nothing is left to decay over."""
    return max(0, step - start) / (steps - 1 - start) if steps - 1 > start else 0.0


def _between(optimizer: Optimizer, share: float) -> float:
    """lr at share 1 and min_lr at share 0, both exactly (a sum min_lr + (lr - min_lr) would be an ulp off)."""
    return optimizer.lr * share + optimizer.min_lr * (1 - share)
