"""Relative positions of T5: a trained bias for each bucket of distances and each head, added to the scores (arXiv:1910.10683, §2.1)."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from models.encoder_config import T5
from models.init import GPT2Init
from models.position import Position
from parallel.grid import Grid
from parallel.slices import Slice, make_parameter


class Relative(Position):
    """score(t, u) + table[bucket(u − t), head]; base class. The table 'buckets H' is cut by heads, and every attention has its own.

    A subclass says in `buckets` which row a distance belongs to, and in `hidden` which keys a query does not see.
    """

    def __init__(self, name: str, model: T5, init: GPT2Init, grid: Grid) -> None:
        super().__init__(name, model, init, grid)
        cut = Slice((model.relative_buckets, model.num_heads), 1, (model.num_heads,))
        full_name = f"{name}.weight"
        self.weight = make_parameter(full_name, init.inner(full_name, cut.shape), cut, grid.tensor_rank, grid.tensor)
        self.settings = (model.relative_buckets, model.relative_distance)

    @contextlib.contextmanager
    def at(self, segments: Tensor | None) -> Iterator[None]:
        """Does nothing: the distance of two tokens of a document does not depend on where in the row the document begins."""
        yield

    def bias(self, q: Tensor) -> Tensor:
        """'h s t' for this rank's heads ('n h 1 t' during decoding), −∞ where the query does not see the key."""

        def distances() -> Tensor:
            found = self.places.of_keys(q) - self.places.of(q)[..., :, None]  # s t, or n 1 1 t
            return found[:, 0] if found.dim() == 4 else found

        distance = self.places.once("distances", distances)
        buckets = self.places.once((type(self), "buckets"), lambda: self.buckets(distance))
        bias = F.embedding(buckets, self.weight).movedim(-1, -3).to(q.dtype)
        return bias.masked_fill(self.hidden(distance)[..., None, :, :], -torch.inf)

    def buckets(self, distance: Tensor) -> Tensor:
        """The rows of the table of distances u − t."""
        raise NotImplementedError

    def hidden(self, distance: Tensor) -> Tensor:
        """True where a query does not see the key at this distance."""
        raise NotImplementedError


class CausalRelative(Relative):
    """A decoder's: all buckets are for keys before the query, and no query sees a later key."""

    def buckets(self, distance: Tensor) -> Tensor:
        return buckets_of(-distance.clamp(max=0), *self.settings)

    def hidden(self, distance: Tensor) -> Tensor:
        return distance > 0


class BidirectionalRelative(Relative):
    """An encoder's: the first half of the buckets is for keys up to the query, the second half for those behind it."""

    def buckets(self, distance: Tensor) -> Tensor:
        buckets, furthest = self.settings
        return buckets_of(distance.abs(), buckets // 2, furthest) + (distance > 0) * (buckets // 2)

    def hidden(self, distance: Tensor) -> Tensor:
        return torch.zeros_like(distance, dtype=torch.bool)


def buckets_of(distance: Tensor, buckets: int, furthest: int) -> Tensor:
    """Bucket of each distance ≥ 0: one each for the first half of them, then wider ones, the last for `furthest` and beyond.

    The same operations in the same order as in transformers, so that a rounding error cannot choose another bucket.
    """
    exact = buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(furthest / exact)
    wide = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return torch.where(distance < exact, distance, wide)
