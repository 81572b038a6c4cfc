"""Small models for the tests of models/: settings with one thing changed, built at any layout, filled with given weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models import gpt
from models.attention import Attention
from models.block import RESIDUALS
from models.config import GPT
from models.mlp import MLPS
from models.registry import BuildContext
from parallel.grid import Grid, make_grid
from parallel.layers import PlainModule, unique_parameters
from parallel.slices import slice_of

SHAPE = dict(
    num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=48, vocab_size=83, seq_length=16, norm="layernorm", norm_eps=1e-5,
    position="learned", mlp="gelu_tanh", residual="pre_norm", init="gpt2", bias=True, qkv_bias=True, qk_norm=False, tied=True,
    embedding_dropout=0.0, residual_dropout=0.0, mlp_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
"""A small GPT-2 with a vocabulary that is not divisible by 2 or 4."""
ROTARY = dict(position="rotary", rotary_fraction=1.0, rotary_base=10_000.0, rotary_scaling="none")
LLAMA_3 = dict(rotary_scaling="llama3", rotary_factor=8.0, rotary_low_factor=1.0, rotary_high_factor=4.0, rotary_original_length=64)
"""Llama 3.1's rotary scaling, of a model that was trained on 64 tokens a sample."""
ALONE = Grid()
SEED = 5
"""The seed of initialisation and dropout in tests that do not name one."""


def shape(**changes) -> GPT:
    """SHAPE with settings replaced. position="rotary" adds rotary's own settings."""
    return GPT(**(SHAPE | (ROTARY if changes.get("position") == "rotary" else {}) | changes))


def parts(model: GPT, grid: Grid = ALONE, variants: Mapping[str, type] | None = None) -> BuildContext:
    """The context that layers are built with."""
    return BuildContext(model, grid, SEED, variants or {})


def made(kind: str, model: GPT, grid: Grid) -> nn.Module:
    """The module "attention", "mlp" or "block" under this name, with this rank's initial weights."""
    built = parts(model, grid)
    if kind == "mlp":
        return MLPS[model.mlp](kind, model, built.init, grid)
    return {"attention": Attention, "block": RESIDUALS[model.residual]}[kind](kind, built)


def whole_model(model: GPT, grid: Grid = ALONE, seed: int = SEED, variants: Mapping[str, type] | None = None) -> PlainModule:
    """All layers in this process (on this tensor rank)."""
    return PlainModule(gpt.layers(model, grid, seed, variants))


def tensor_grid(sequence: bool = False) -> Grid:
    """Every rank of the world on the tensor axis. One torch thread per rank: the tensors are small, and there may be few cores."""
    torch.set_num_threads(1)
    return make_grid(1, torch.distributed.get_world_size(), sequence)


def fill(module: nn.Module, weights: Mapping[str, Tensor], grid: Grid = ALONE) -> None:
    """Sets each parameter to this rank's slice of the whole tensor of its logical name."""
    with torch.no_grad():
        for name, parameter in unique_parameters(module):
            parameter.copy_(slice_of(parameter).cut(weights[name], grid.tensor_rank, grid.tensor))


def scatter(module: nn.Module, seed: int = 0) -> None:
    """Moves every parameter of a module on one rank away from its initial value: biases from 0, norms from 1."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g, dtype=torch.float64).to(parameter.dtype), alpha=0.2)


def random_weights(model: GPT, seed: int, variants: Mapping[str, type] | None = None) -> dict[str, Tensor]:
    """Weights of a whole model in fp64, far from initial values, at which a lost bias or norm would not be noticed."""
    module = whole_model(model, variants=variants).double()
    scatter(module, seed)
    return values(module)


def values(module: nn.Module) -> dict[str, Tensor]:
    """This rank's parameters by logical name, detached copies."""
    return {name: parameter.detach().clone() for name, parameter in unique_parameters(module)}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """This rank's gradients by logical name; every parameter must have one."""
    found = {name: parameter.grad for name, parameter in unique_parameters(module)}
    assert all(gradient is not None for gradient in found.values()), [name for name, g in found.items() if g is None]
    return found


def as_arrays(tensors: Mapping[str, Tensor]) -> dict:
    """Tensors as numpy arrays, which travel between processes by value."""
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def joined(model: GPT, ranks: list[Mapping], variants: Mapping[str, type] | None = None) -> dict[str, Tensor]:
    """Whole tensors by logical name from the arrays of all tensor ranks. What is not sliced must be equal on all of them."""
    return joined_as(whole_model(model, variants=variants), ranks)


def joined_as(module: nn.Module, ranks: list[Mapping]) -> dict[str, Tensor]:
    """The same for the parameters of a model on one rank."""
    found = {}
    for name, parameter in unique_parameters(module):
        pieces = [torch.from_numpy(rank[name]) for rank in ranks]
        if slice_of(parameter).dim is None:
            assert all(torch.equal(piece, pieces[0]) for piece in pieces), f"{name} differs between tensor ranks"
        found[name] = slice_of(parameter).join(pieces)
    return found


def relative(found: Tensor, true: Tensor) -> float:
    """‖found − true‖₂ / ‖true‖₂, in fp64."""
    return float((found.detach().double() - true.detach().double()).norm() / true.detach().double().norm())


def worst(found: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest `relative` error of a parameter, and its name. A true norm below 1e-6 of the whole counts as the whole."""
    assert found.keys() == true.keys()
    whole = torch.stack([tensor.double().norm() for tensor in true.values()]).norm()
    errors = {}
    for name, tensor in true.items():
        norm = tensor.double().norm()
        errors[name] = float((found[name].detach().double() - tensor.double()).norm() / (norm if norm > 1e-6 * whole else whole))
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


def random_part(kind: str, model: GPT, seed: int = 0) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(whole weights, x 'b s d', dy 'b s d') of a part in fp64, with all weights, biases and norms far from initial values."""
    g = torch.Generator().manual_seed(seed)
    module = made(kind, model, ALONE).double()
    weights = {name: tensor + 0.3 * torch.randn(tensor.shape, generator=g, dtype=torch.float64) for name, tensor in values(module).items()}
    x, dy = (torch.randn(2, 7, model.hidden_size, generator=g, dtype=torch.float64) for _ in range(2))
    return weights, x, dy


def joined_part(kind: str, model: GPT, ranks: list[Mapping]) -> dict[str, Tensor]:
    """y, dx and whole gradients from what each tensor rank returned. y and dx must be equal on all of them."""
    cuts = {name: slice_of(parameter) for name, parameter in unique_parameters(made(kind, model, ALONE))}
    found = {}
    for name in ranks[0]:
        pieces = [torch.from_numpy(rank[name]) for rank in ranks]
        if name not in cuts or cuts[name].dim is None:
            assert all(torch.equal(piece, pieces[0]) for piece in pieces), f"{name} differs between tensor ranks"
        found[name] = cuts[name].join(pieces) if name in cuts else pieces[0]
    return found
