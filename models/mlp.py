"""The MLP (feed-forward layer) of a block: up-projection (cut by columns), activation, down-projection (cut by rows)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.dropout import Dropout
from models.encoder_config import AnyModel
from models.init import GPT2Init
from parallel.grid import Grid
from parallel.linear import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """x -> down(activate(up(x))). Base class: a subclass defines `activate`.

    x: 'b s d', equal on every tensor rank, and so is the output; 'b s f/tp' between the projections. A subclass with `gates = 2`
    gets gate and up in one tensor: each rank's 'b s (2 f)' is its slice of the gate followed by its slice of up.
    """

    gates = 1

    def __init__(self, name: str, model: AnyModel, init: GPT2Init, grid: Grid) -> None:
        super().__init__()
        d, f = model.hidden_size, model.ffn_size
        self.dropout = Dropout(name, model.mlp_dropout, init.seed, grid, sliced=True)
        self.up = ColumnParallelLinear(f"{name}.up", d, (f,) * self.gates, model.bias, init.inner, grid)
        self.down = RowParallelLinear(f"{name}.down", f, d, model.bias, init.residual, grid)

    def forward(self, x: Tensor, samples: Tensor | None = None) -> Tensor:
        """'b s d' -> 'b s d'; samples: 'b', the global sample indices that dropout masks are computed from."""
        return self.down(self.dropout(self.activate(self.up(x)), samples))

    def activate(self, x: Tensor) -> Tensor:
        """'b s (gates f)' -> 'b s f', elementwise in f."""
        raise NotImplementedError


class GELU(MLP):
    """x·Φ(x), exact (arXiv:1606.08415)."""

    def activate(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class GELUTanh(MLP):
    """The tanh approximation of GELU, as in GPT-2."""

    def activate(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class ReLU(MLP):
    """max(x, 0) (arXiv:1706.03762)."""

    def activate(self, x: Tensor) -> Tensor:
        return F.relu(x)


class ReLU2(MLP):
    """max(x, 0)² (Primer, arXiv:2109.08668)."""

    def activate(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class SwiGLU(MLP):
    """silu(gate)·up (arXiv:2002.05202)."""

    gates = 2

    def activate(self, x: Tensor) -> Tensor:
        gate, up = torch.chunk(x, 2, dim=-1)
        return F.silu(gate) * up


class GeGLU(MLP):
    """gelu(gate)·up (arXiv:2002.05202)."""

    gates = 2

    def activate(self, x: Tensor) -> Tensor:
        gate, up = torch.chunk(x, 2, dim=-1)
        return F.gelu(gate) * up


class GeGLUTanh(MLP):
    """The tanh approximation of gelu(gate)·up, as in T5 1.1."""

    gates = 2

    def activate(self, x: Tensor) -> Tensor:
        gate, up = torch.chunk(x, 2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up


MLPS = {
    "gelu": GELU,
    "gelu_tanh": GELUTanh,
    "relu": ReLU,
    "relu2": ReLU2,
    "swiglu": SwiGLU,
    "geglu": GeGLU,
    "geglu_tanh": GeGLUTanh,
}
