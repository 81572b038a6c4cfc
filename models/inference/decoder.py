"""Decoder: a model with a KV cache. Prompts are read into free rows, then every row is decoded one token at a time.

It is what a server, a batch and a beam search are built on. It takes no decisions: token ids go in, logits come out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.attention import Attention
from models.config import GPT
from models.estimates.communication import has_closed_form
from models.inference.cache import CachedCore, CacheRows
from models.inference.packed_weights import pack_weights
from models.position import Position
from parallel.collectives import gather_from_tensor_ranks
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import PlainModule

PROBE_TOKENS = 8
"""The number of tokens on which classes of a variant.py are checked: does decoding one token at a time give the same logits?"""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest allowed difference of a logit in that check, relative to the largest logit; 0.05 in lower precisions. Wrong positions
give far larger differences."""


class Decoder:
    """Decodes with `module`, which it changes and owns from now on, over `slots` rows of `length` tokens each.

    Every method is collective over the tensor ranks. Rows in use are 0 … n − 1. Logits are 'n v', at least fp32, of the whole
    vocabulary, equal on every tensor rank: only the logits of the n next tokens are gathered.

    A class of the experiment's variant.py may look at earlier tokens only through attention, and a position scheme must take
    positions from `self.places`. A Mistake is raised if decoding one token at a time does not give the logits of a full pass.
    """

    def __init__(self, module: PlainModule, model: GPT, grid: Grid, slots: int, length: int) -> None:
        if model.position == "learned" and length > model.seq_length:
            raise Mistake(f"a context of {length} tokens is longer than the learned positions → use model.seq_length = {model.seq_length}")
        self.module, self.model, self.grid = module.eval(), model, grid
        has_variants = not has_closed_form(model)
        pack_weights(module, slots, release=not has_variants)
        weight = next(module.parameters())
        self.rows = CacheRows(slots, length, weight.device)

        # Classes of a variant.py are tried on a few tokens, before and after the cache is installed.
        probe = [7919 * (i + 1) % model.vocab_size for i in range(min(PROBE_TOKENS, length))]
        expected = self._prompt_logits([probe]) if has_variants else None
        self.cores = self._install_cache(weight.dtype)
        if expected is not None:
            self._refuse_different_logits(probe, expected)

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row in use."""
        return self.rows.lengths

    @property
    def free(self) -> int:
        """Number of rows that are not in use."""
        return self.rows.slots - len(self.rows.lengths)

    @torch.inference_mode()
    def admit(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads prompts (not empty, of any lengths) into as many new rows behind those in use. Returns the logits after each."""
        self.rows.prefill([len(prompt) for prompt in prompts])
        return self._prompt_logits(prompts)

    @torch.inference_mode()
    def step(self, ids: Sequence[int]) -> Tensor:
        """Reads one more token of every row in use, in order. Returns the logits after each."""
        self.rows.advance()
        return self._logits(self.module.hidden(torch.tensor(ids, device=self.rows.device)[:, None]))

    def drop(self, row: int) -> None:
        """Frees a row. The last row in use takes its place."""
        last, length = len(self.lengths) - 1, self.rows.lengths.pop()
        if row != last:
            for core in self.cores:
                core.move(last, row, length)
            self.rows.lengths[row] = length

    def reorder(self, parents: Sequence[int]) -> None:
        """Row i becomes a copy of what row parents[i] was. Afterwards as many rows are in use as there are parents."""
        lengths = [self.lengths[parent] for parent in parents]
        if list(parents) != list(range(len(parents))):
            for core in self.cores:
                core.gather(torch.tensor(parents, device=self.rows.device), max(lengths))
        self.rows.lengths = lengths

    def clear(self) -> None:
        """Frees all rows."""
        self.rows.lengths = []

    def _install_cache(self, dtype: torch.dtype) -> list[CachedCore]:
        """Replaces the core of every attention by one with a cache, and the positions of every position scheme by the rows'."""
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

    def _prompt_logits(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The logits after each of some whole prompts. Shorter ones are padded at the end, which no earlier token attends to."""
        lengths, device = [len(prompt) for prompt in prompts], self.rows.device
        ids = torch.zeros((len(prompts), max(lengths)), dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        x = self.module.hidden(ids.to(device))
        last = torch.tensor(lengths, device=device) - 1
        return self._logits(x[torch.arange(len(x), device=device), last][:, None])

    def _logits(self, x: Tensor) -> Tensor:
        """'n 1 d' -> 'n v', gathered over the tensor ranks."""
        logits = gather_from_tensor_ranks(self.module.logits(x)[:, 0], self.grid.tensor_group)[:, : self.model.vocab_size]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.inference_mode()
    def _refuse_different_logits(self, probe: list[int], expected: Tensor) -> None:
        """A Mistake if the second half of `probe`, read one token at a time, does not end in the `expected` logits of a full pass."""
        half = len(probe) // 2
        Decoder.admit(self, [probe[:half]])  # not a driver's: every tensor rank is here, and no worker listens yet
        for token in probe[half:]:
            logits = Decoder.step(self, [token])
        Decoder.clear(self)
        error = float((logits - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE.get(next(self.module.parameters()).dtype, 0.05):
            raise Mistake(
                f"classes of variant.py compute other logits a token at a time than at once (off by {error:.1g} of the largest) → "
                "let a position class ask self.places for places (models/position.py), and look at earlier tokens in attention only"
            )
