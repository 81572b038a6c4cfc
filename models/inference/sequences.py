"""The sequences that a decoder works on: with a KV cache, or as token ids that every pass reads again.

Both kinds keep their sequences in rows 0 … n − 1 and return 'n d', the last hidden state of each row that a call has read.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from models.encoder_config import AnyModel
from models.inference.cache import CachedCore, CacheRows, install_cache
from parallel.grid import Grid
from parallel.layers import PlainModule


class Sequences(Protocol):
    """What a decoder needs of either kind."""

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row in use."""

    def admit(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads prompts into as many new rows behind those in use."""

    def step(self, ids: Sequence[int]) -> Tensor:
        """Reads one more token of every row in use, in order."""

    def drop(self, row: int) -> None:
        """Frees a row. The last row in use takes its place."""

    def reorder(self, parents: Sequence[int]) -> None:
        """Row i becomes a copy of what row parents[i] was. Afterwards as many rows are in use as there are parents."""

    def clear(self) -> None:
        """Frees all rows."""


class CachedSequences:
    """Sequences whose keys and values are kept, so that a step reads one token of each row. Changes the module."""

    def __init__(self, module: PlainModule, model: AnyModel, grid: Grid, slots: int, length: int) -> None:
        self.module = module
        self.rows = CacheRows(slots, length, next(module.parameters()).device)
        self.cores: list[CachedCore] = install_cache(module, self.rows, max(model.num_kv_heads // grid.tensor, 1))

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row in use."""
        return self.rows.lengths

    def admit(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """One pass over the prompts; their keys and values are written into new rows."""
        self.rows.prefill([len(prompt) for prompt in prompts])
        return last_hidden(self.module, prompts)

    def step(self, ids: Sequence[int]) -> Tensor:
        """One pass over one token per row."""
        self.rows.advance()
        return self.module.hidden(torch.tensor(ids, device=self.rows.device)[:, None])[:, 0]

    def drop(self, row: int) -> None:
        """Copies the last row to the freed one."""
        last, length = len(self.lengths) - 1, self.rows.lengths.pop()
        if row != last:
            for core in self.cores:
                core.move(last, row, length)
            self.rows.lengths[row] = length

    def reorder(self, parents: Sequence[int]) -> None:
        """Copies rows, unless each stays where it is."""
        lengths = [self.lengths[parent] for parent in parents]
        if list(parents) != list(range(len(parents))):
            for core in self.cores:
                core.gather(torch.tensor(parents, device=self.rows.device), max(lengths))
        self.rows.lengths = lengths

    def clear(self) -> None:
        """Frees all rows."""
        self.rows.lengths = []


class UncachedSequences:
    """Sequences of ids. Every step is a pass over all tokens of all rows."""

    def __init__(self, module: PlainModule) -> None:
        self.module = module
        self.ids: list[list[int]] = []

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row in use."""
        return [len(ids) for ids in self.ids]

    def admit(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """One pass over the prompts."""
        self.ids += [list(prompt) for prompt in prompts]
        return last_hidden(self.module, prompts)

    def step(self, ids: Sequence[int]) -> Tensor:
        """One pass over every row, to which its next token has been appended."""
        for row, token in zip(self.ids, ids, strict=True):
            row.append(token)
        return last_hidden(self.module, self.ids)

    def drop(self, row: int) -> None:
        """Moves the last row to the freed one."""
        last = self.ids.pop()
        if row < len(self.ids):
            self.ids[row] = last

    def reorder(self, parents: Sequence[int]) -> None:
        """Copies rows."""
        self.ids = [list(self.ids[parent]) for parent in parents]

    def clear(self) -> None:
        """Frees all rows."""
        self.ids = []


def last_hidden(module: PlainModule, texts: Sequence[Sequence[int]]) -> Tensor:
    """'n d' after some whole texts. Shorter ones are padded at the end, which no earlier token attends to."""
    lengths, device = [len(text) for text in texts], next(module.parameters()).device
    ids = torch.zeros((len(texts), max(lengths)), dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    x = module.hidden(ids.to(device))
    return x[torch.arange(len(x), device=device), torch.tensor(lengths, device=device) - 1]
