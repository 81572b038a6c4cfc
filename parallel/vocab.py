"""The embedding and the heads, with the vocabulary sliced over tensor ranks.

A vocabulary that the tensor degree does not divide is padded. Padded rows are zero, receive no probability and no gradient
(parallel/cross_entropy.py), and are in no checkpoint.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from parallel.grid import Grid
from parallel.linear import Draw, zeros
from parallel.region import region_of
from parallel.slices import Slice, make_parameter, slice_of


class VocabParallelEmbedding(nn.Module):
    """Rank i holds rows [i·V/tp, (i+1)·V/tp) of the table, looks up the ids in that range, returns zero for others; then the sum.

    ids: 'b s', equal on every tensor rank  ->  x: 'b s d', equal on every tensor rank ('b s/tp d' under sequence parallelism).
    It holds nothing but `weight`, so that a pipeline can tie it to the head (DeepSpeed's TiedLayerSpec).
    """

    def __init__(self, name: str, vocab_size: int, hidden_size: int, draw: Draw, grid: Grid) -> None:
        super().__init__()
        self.weight = vocab_table(name, vocab_size, hidden_size, draw, grid)
        self.region = region_of(grid)
        self.start = grid.tensor_rank * len(self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """'b s' -> 'b s d'."""
        if self.region.group is None:
            return F.embedding(ids, self.weight)
        rows = self.weight.shape[0]
        local = ids - self.start
        elsewhere = (local < 0) | (local >= rows)
        x = F.embedding(local.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return self.region.leave(x)

    def logits(self, x: Tensor) -> Tensor:
        """'b s d' -> 'b s v': the tied head, on this rank's rows."""
        return F.linear(self.region.enter(x), self.weight)

    def extra_repr(self) -> str:
        """The cut, e.g. `[8192, 192] cut along dim 0`."""
        return str(slice_of(self.weight))


class VocabParallelHead(nn.Module):
    """logits = x Wᵀ with W cut by vocabulary rows. x: 'b s d', equal on every rank  ->  'b s v', this rank's rows."""

    product = staticmethod(F.linear)
    """See ColumnParallelLinear.product."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, draw: Draw, grid: Grid) -> None:
        super().__init__()
        self.weight = vocab_table(name, vocab_size, hidden_size, draw, grid)
        self.region = region_of(grid)

    def forward(self, x: Tensor) -> Tensor:
        """'b s d' ('b s/tp d' under sequence parallelism) -> 'b s v'."""
        return self.product(self.region.enter(x), self.weight, None)


class TiedHead(nn.Module):
    """A head that holds its embedding's own parameter. x: 'b s d'  ->  'b s v'.

    It is a module of its own, because ZeRO-3 gathers a module's parameters when the module is called.
    """

    product = staticmethod(F.linear)
    """See ColumnParallelLinear.product."""

    def __init__(self, embedding: VocabParallelEmbedding) -> None:
        super().__init__()
        self.weight, self.region = embedding.weight, embedding.region

    def forward(self, x: Tensor) -> Tensor:
        """'b s d' ('b s/tp d' under sequence parallelism) -> 'b s v'."""
        return self.product(self.region.enter(x), self.weight, None)


class VocabParallelBias(nn.Module):
    """logits + b with b cut like the logits. It is a layer of its own behind a tied head, in which a pipeline ties the weight alone."""

    def __init__(self, name: str, vocab_size: int, grid: Grid) -> None:
        super().__init__()
        full_name, cut = f"{name}.bias", Slice((vocab_size,), 0, (vocab_size,))
        self.bias = make_parameter(full_name, zeros(full_name, cut.shape), cut, grid.tensor_rank, grid.tensor)

    def forward(self, logits: Tensor) -> Tensor:
        """'b s v' -> 'b s v'."""
        return logits + self.bias


def vocab_table(name: str, vocab_size: int, hidden_size: int, draw: Draw, grid: Grid) -> nn.Parameter:
    """This rank's rows of a V × d table, padded with zeros to a multiple of the tensor degree."""
    cut = Slice((vocab_size, hidden_size), 0, (vocab_size,))
    full_name = f"{name}.weight"
    return make_parameter(full_name, draw(full_name, cut.shape), cut, grid.tensor_rank, grid.tensor)
