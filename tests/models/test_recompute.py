"""Recomputation gives the same results bit for bit, also with dropout, and keeps less for the backward pass."""

import functools

import pytest
import torch
from torch import Tensor, nn

from models import gpt
from models.block import RESIDUALS
from models.config import GPT
from models.recompute import recomputed, rerun
from models.registry import BuildContext
from parallel.layers import PlainModule
from tests.models.helpers.build import ALONE, gradients, scatter, shape

MODES = ("none", "selective", "full")
EVERYWHERE = dict(embedding_dropout=0.1, residual_dropout=0.1, mlp_dropout=0.1, attention_dropout=0.1)
SAMPLES = torch.tensor([3, 70])
B, S = 2, 48


def trained(model: GPT, recompute: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients of their weighted sum."""
    module = PlainModule(gpt.layers(model, ALONE, 5, recompute=recompute))
    scatter(module)
    ids = torch.randint(0, model.vocab_size, (B, model.seq_length), generator=torch.Generator().manual_seed(0))
    logits = module((ids, SAMPLES) if model.drops else ids)
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)))
    return logits.detach(), gradients(module)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dropout", [{}, EVERYWHERE], ids=["no dropout", "dropout"])
def test_every_mode_computes_the_same_to_the_bit(residual, dropout):
    model = shape(residual=residual, num_kv_heads=2, **dropout)
    logits, found = trained(model, "none")
    for mode in MODES[1:]:
        again, theirs = trained(model, mode)
        assert torch.equal(again, logits)
        assert found.keys() == theirs.keys()
        assert all(torch.equal(theirs[name], gradient) for name, gradient in found.items())


def test_torch_s_own_random_numbers_are_left_alone():
    """Dropout uses no generator, and none is saved and restored: torch's random numbers continue as if there were no model."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    trained(shape(**EVERYWHERE), "full")
    assert torch.equal(torch.rand(3), expected)


def block_of(recompute: str, **changes) -> nn.Module:
    model = shape(seq_length=S, **changes)
    kind = RESIDUALS[model.residual]
    return (recomputed(kind) if recompute == "full" else kind)("block", BuildContext(model, ALONE, 5, {}, recompute))


def kept_for_backward(recompute: str, **changes) -> list[Tensor]:
    """One tensor for each storage that a block's forward pass leaves to its backward pass, parameters not counted."""
    block = block_of(recompute, **changes)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(B, S, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, SAMPLES)
    return list(found.values())


def size(tensors: list[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


SQUARE = B * 4 * S * S  # b h s s


@pytest.mark.parametrize("dropout", [{}, EVERYWHERE], ids=["no dropout", "dropout"])
def test_full_keeps_the_block_s_inputs_alone(dropout):
    inputs = B * S * 32 * 4 + SAMPLES.numel() * 8
    assert inputs <= size(kept_for_backward("full", **dropout)) <= 1.01 * inputs
    assert size(kept_for_backward("none", **dropout)) > 8 * inputs


def test_selective_keeps_no_square_of_the_sequence():
    """Attention with explicit probabilities keeps several. Without dropout the fused kernel keeps none in any mode."""
    squares = {mode: sum(tensor.numel() >= SQUARE for tensor in kept_for_backward(mode, **EVERYWHERE)) for mode in MODES}
    assert squares["none"] >= 2 and squares["selective"] == squares["full"] == 0
    assert not any(tensor.numel() >= SQUARE for tensor in kept_for_backward("none"))


def test_each_mode_keeps_less_than_the_one_before():
    bytes_kept = [size(kept_for_backward(mode, **EVERYWHERE)) for mode in MODES]
    assert bytes_kept[0] > 2 * bytes_kept[1] > 4 * bytes_kept[2], bytes_kept


def test_what_is_rerun_is_run_twice_in_training_and_once_without_gradients():
    calls = []

    def forward(x: Tensor, numbers: Tensor) -> Tensor:
        calls.append(numbers)
        return x.sin() * numbers

    x, again = torch.randn(4, requires_grad=True), rerun(forward)
    again(x, torch.arange(4)).sum().backward()
    assert len(calls) == 2 and torch.allclose(x.grad, x.detach().cos() * torch.arange(4))
    with torch.no_grad():
        again(x, torch.arange(4))
    assert len(calls) == 3


def test_a_constructor_keeps_its_arguments_and_its_class():
    module = recomputed(functools.partial(nn.Linear, 3))(2, bias=False)
    assert type(module) is nn.Linear and module.weight.shape == (2, 3) and module.bias is None
