"""Rotary frequencies made lower, so that a model reads texts longer than those it was first trained on."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from models.config import GPT


def scaled(frequencies: Tensor, model: GPT) -> Tensor:
    """The frequencies of the pairs, radians a token, 'i' fp32, as `model.rotary_scaling` has them; a variant may leave it out."""
    return SCALINGS[model.rotary_scaling or "none"](frequencies, model)


def unscaled(frequencies: Tensor, model: GPT) -> Tensor:
    """As they are."""
    return frequencies


def linear(frequencies: Tensor, model: GPT) -> Tensor:
    """All of them divided by the factor: positions t / factor (arXiv:2306.15595)."""
    assert model.rotary_factor is not None  # config validates
    return frequencies / model.rotary_factor


def llama3(frequencies: Tensor, model: GPT) -> Tensor:
    """Short wavelengths as they are, long ones divided by the factor, in between a mean of both (Llama 3.1, arXiv:2407.21783, §3.4).

    Operation for operation as transformers has it, so that equal settings give equal bits.
    """
    factor, low, high, length = model.rotary_factor, model.rotary_low_factor, model.rotary_high_factor, model.rotary_original_length
    assert factor is not None and low is not None and high is not None and length is not None  # config validates
    wavelengths = 2 * math.pi / frequencies
    found = torch.where(wavelengths > length / low, frequencies / factor, frequencies)
    smooth = (length / wavelengths - low) / (high - low)
    between = (wavelengths >= length / high) & (wavelengths <= length / low)
    return torch.where(between, (1 - smooth) * found / factor + smooth * found, found)


SCALINGS: dict[str, Callable[[Tensor, GPT], Tensor]] = {"none": unscaled, "linear": linear, "llama3": llama3}
