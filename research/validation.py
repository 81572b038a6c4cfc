"""Held-out text: loss, perplexity and bits per byte over all tokens of a split, equal on every layout."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from parallel.engine import Engine
from research.data.batches import validation_batches
from research.data.store import TokenStore
from research.metrics import perplexity
from research.tensors import micro_batch


@dataclass(frozen=True)
class Validation:
    """Mean nats a token, and the same per UTF-8 byte in bits."""

    loss: float
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        """e^loss."""
        return perplexity(self.loss)

    def row(self) -> dict[str, float]:
        """The keys of metrics.jsonl."""
        return {"val/loss": self.loss, "val/ppl": self.perplexity, "val/bits_per_byte": self.bits_per_byte}


def validate(
    engine: Engine, split: TokenStore, seq_length: int, numbered: bool = False, go_on: Callable[[], bool] = lambda: True
) -> Validation | None:
    """Every token of `split` but the first, predicted once from at most seq_length tokens before it. Collective.

    `numbered`: batches carry context, as the training ones do (nothing is dropped, but a pipeline's shapes are fixed).
    `go_on` is asked before each batch, the same answer on every rank; None where it was no.
    Bits per byte = Σ nats / (ln 2 · bytes): end-of-text's loss counts, its bytes do not.
    """
    grid, settings = engine.grid, engine.settings
    nats = tokens = 0.0
    for batch, count in validation_batches(split, seq_length, settings.micro_batch_size, grid.data_rank, grid.data):
        if not go_on():
            return None
        nats += engine.evaluate_batch(micro_batch(batch, numbered)) * count
        tokens += count
    return Validation(loss=nats / tokens, bits_per_byte=nats / math.log(2) / split.num_bytes)
