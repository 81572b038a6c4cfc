"""The positions of the tokens of a forward pass: one class that position encodings, dropout and attention ask."""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from parallel.region import TensorParallelRegion

T = TypeVar("T")


class TokenPositions:
    """Positions 0, 1, 2, … of whole sequences. models/inference/cache.py has a subclass for decoding.

    Inside a sliced region a rank holds all positions: ask `of`. Outside, it holds those that its region assigns to it: ask `own`.
    """

    def __init__(self, region: TensorParallelRegion) -> None:
        self.region = region

    def of(self, x: Tensor) -> Tensor:
        """Positions of the tokens of x '… s d' inside a sliced region: int64 's', or a shape that broadcasts to '… s'."""
        return torch.arange(x.shape[-2], device=x.device)

    def of_keys(self, x: Tensor) -> Tensor:
        """Positions 't' of the keys that queries x 'b h s e' attend to."""
        return self.of(x)

    def own(self, x: Tensor) -> Tensor:
        """Positions of this rank's tokens x 'b s d' outside sliced regions: int64 's', or a shape that broadcasts to 'b s'."""
        return torch.arange(x.shape[1], device=x.device) + self.region.first_position(x)

    def rows(self, table: Tensor, x: Tensor) -> Tensor:
        """The rows of a table 'seq_length d' at the positions of x 'b s d' outside sliced regions: 's d' or 'b s d'."""
        first = self.region.first_position(x)
        return table[first : first + x.shape[1]]

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`. A subclass may return what another layer made under the same key for the same positions."""
        return make()
