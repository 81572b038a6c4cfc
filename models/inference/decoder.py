"""A model that writes: prompts into free rows of a static cache, then a token at a time of all of them, through its own modules.

What a server, a batch and a beam search are made of. It decides nothing: ids go in, logits come out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.attention import Attention
from models.config import GPT
from models.estimates.communication import has_closed_form
from models.inference.cache import CachedCore, Rows
from models.inference.packed_weights import pack_weights
from models.position import Position
from parallel.collectives import gather_from_tensor_ranks
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import PlainModule

TRIED = 8
"""Tokens on which a model with classes of its own shows that it can be decoded a token at a time."""
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest difference of a logit, of the largest logit; in lower precisions 0.05. A wrong place is off by far more."""


class Decoder:
    """`module`, from now on the decoder's own, over `slots` rows of `length` tokens each. Every method is collective over tensor ranks.

    Rows in use are 0 … n − 1. Logits are 'n v', fp32 at least, of the whole vocabulary, equal on every tensor rank: the head's slices stay
    where they are until here, where n rows, the next tokens', are gathered.

    A class of the experiment's own may be anything that looks at earlier tokens through attention alone. A position scheme of
    its own must ask `self.places`; whether what it computes a token at a time is what it computes at once is tried here.
    """

    def __init__(self, module: PlainModule, model: GPT, grid: Grid, slots: int, length: int) -> None:
        if model.position == "learned" and length > model.seq_length:
            raise Mistake(f"a context of {length} tokens is longer than the learned positions → use model.seq_length = {model.seq_length}")
        self.module, self.model, self.grid = module.eval(), model, grid
        pack_weights(module, slots, release=has_closed_form(model))
        weight = next(module.parameters())
        self.rows = Rows(slots, length, weight.device)
        tried = None if has_closed_form(model) else _tried(model, length)
        alone = [] if tried is None else [self._whole([tried])]
        self.cores = self._cached(weight.dtype)
        if tried is not None:
            self._refuse_unlike(alone[0], tried)

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row in use."""
        return self.rows.lengths

    @property
    def free(self) -> int:
        """Rows that are not in use."""
        return self.rows.slots - len(self.rows.lengths)

    @torch.inference_mode()
    def admit(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads prompts (not empty, of any lengths) into as many new rows behind those in use; the logits after each."""
        self.rows.begin([len(prompt) for prompt in prompts])
        return self._whole(prompts)

    @torch.inference_mode()
    def step(self, ids: Sequence[int]) -> Tensor:
        """One more token for every row in use, in order; the logits after it."""
        self.rows.advance()
        return self._logits(self.module.hidden(torch.tensor(ids, device=self.rows.device)[:, None]))

    def drop(self, row: int) -> None:
        """Frees a row. The last one takes its place."""
        last, length = len(self.lengths) - 1, self.rows.lengths.pop()
        if row != last:
            for core in self.cores:
                core.move(last, row, length)
            self.rows.lengths[row] = length

    def reorder(self, parents: Sequence[int]) -> None:
        """Row i goes on from what row parents[i] was; as many rows are then in use as there are parents."""
        lengths = [self.lengths[parent] for parent in parents]
        if list(parents) != list(range(len(parents))):
            for core in self.cores:
                core.gather(torch.tensor(parents, device=self.rows.device), max(lengths))
        self.rows.lengths = lengths

    def clear(self) -> None:
        """Frees all rows."""
        self.rows.lengths = []

    def _cached(self, dtype: torch.dtype) -> list[CachedCore]:
        """Puts a cache behind every attention and tells every position scheme where its tokens are."""
        cores = []
        heads = max(self.model.num_kv_heads // self.grid.tensor, 1)
        for part in list(self.module.modules()):
            if isinstance(part, Position):
                part.places = self.rows
            if isinstance(part, Attention):
                core = part.core.core if isinstance(part.core, CachedCore) else part.core
                part.core = CachedCore(core, self.rows, heads, part.head_size, dtype)
                cores.append(part.core)
        return cores

    def _whole(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits after each of some whole prompts. Shorter ones are filled up at their ends, where no earlier token looks."""
        lengths, device = [len(prompt) for prompt in prompts], self.rows.device
        ids = torch.zeros((len(prompts), max(lengths)), dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        x = self.module.hidden(ids.to(device))
        last = torch.tensor(lengths, device=device) - 1
        return self._logits(x[torch.arange(len(x), device=device), last][:, None])

    def _logits(self, x: Tensor) -> Tensor:
        """'n 1 d' -> 'n v'."""
        logits = gather_from_tensor_ranks(self.module.logits(x)[:, 0], self.grid.tensor_group)[:, : self.model.vocab_size]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.inference_mode()
    def _refuse_unlike(self, alone: Tensor, tried: list[int]) -> None:
        """A Mistake where the last of some tokens, read after the others, has other logits than read with them."""
        half = len(tried) // 2
        self.admit([tried[:half]])
        for token in tried[half:]:
            after = self.step([token])
        self.clear()
        error = float((after - alone).abs().max() / alone.abs().max())
        if not error <= CLOSE.get(next(self.module.parameters()).dtype, 0.05):
            raise Mistake(
                f"classes of variant.py compute other logits a token at a time than at once (off by {error:.1g} of the largest) → "
                "let a position class ask self.places for places (models/position.py), and look at earlier tokens in attention only"
            )


def _tried(model: GPT, length: int) -> list[int]:
    return [7919 * (i + 1) % model.vocab_size for i in range(min(TRIED, length))]
