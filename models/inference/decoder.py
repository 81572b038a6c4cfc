"""Decoder: a model with a KV cache. Prompts are read into free rows, then every row is decoded one token at a time.

It is what a server, a batch and a beam search are built on. It takes no decisions: token ids go in, logits come out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.config import has_variants
from models.encoder_config import AnyModel
from models.inference.packed_weights import pack_weights
from models.inference.sequences import CachedSequences, Sequences, UncachedSequences
from models.inference.variant_check import full_logits, refuse_dependent_logits, why_uncached
from models.position import Learned
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import PlainModule


class Decoder:
    """Decodes with `module`, which it changes and owns from now on, over `slots` rows of `length` tokens each.

    Every method is collective over the tensor ranks. Rows in use are 0 … n − 1. Logits are 'n v', at least fp32, of the whole
    vocabulary, equal on every tensor rank: only the logits of the n next tokens are gathered.

    A model with classes of the experiment's variant.py is tried first, over `length` tokens. If decoding with a cache does not give
    the logits of a whole pass, there is no cache: each token is computed by a pass over the whole text, and `uncached` says why. A
    Mistake is raised if a token's logits depend on more than the tokens before it, because then nothing can be generated.
    """

    def __init__(self, module: PlainModule, model: AnyModel, grid: Grid, slots: int, length: int) -> None:
        if length > model.seq_length and any(isinstance(part, Learned) for part in module.modules()):
            raise Mistake(f"a context of {length} tokens is longer than the learned positions → use model.seq_length = {model.seq_length}")
        self.module, self.model, self.grid, self.slots, self.length = module.eval(), model, grid, slots, length
        self.uncached: str | None = None
        """Why there is no KV cache, as a sentence without a full stop; None if there is one."""
        if has_variants(model):
            refuse_dependent_logits(module, model, grid, length)
            if reason := why_uncached(module, model, grid, length):
                self.uncached = f"no KV cache, so each token costs a pass over the whole text: {reason}"
        pack_weights(module, slots, release=not has_variants(model))
        self.sequences: Sequences = UncachedSequences(module) if self.uncached else CachedSequences(module, model, grid, slots, length)

    def continued(self, prompt: Sequence[int]) -> Sequence[int]:
        """The tokens that the new ones continue, in which a repetition penalty looks for repetitions: the prompt."""
        return prompt

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row in use."""
        return self.sequences.lengths

    @property
    def free(self) -> int:
        """Number of rows that are not in use."""
        return self.slots - len(self.lengths)

    @property
    def cache_bytes(self) -> int:
        """Size of this rank's KV cache; 0 if there is none."""
        cores = self.sequences.cores if isinstance(self.sequences, CachedSequences) else []
        return sum(core.keys.nbytes + core.values.nbytes for core in cores)

    @torch.inference_mode()
    def admit(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads prompts (not empty, of any lengths) into as many new rows behind those in use. Returns the logits after each."""
        return full_logits(self.module, self.model, self.grid, self.sequences.admit(prompts))

    @torch.inference_mode()
    def step(self, ids: Sequence[int]) -> Tensor:
        """Reads one more token of every row in use, in order. Returns the logits after each."""
        return full_logits(self.module, self.model, self.grid, self.sequences.step(ids))

    def drop(self, row: int) -> None:
        """Frees a row. The last row in use takes its place."""
        self.sequences.drop(row)

    def reorder(self, parents: Sequence[int]) -> None:
        """Row i becomes a copy of what row parents[i] was. Afterwards as many rows are in use as there are parents."""
        self.sequences.reorder(parents)

    def clear(self) -> None:
        """Frees all rows."""
        self.sequences.clear()
