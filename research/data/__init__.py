"""Text → tokens → batches. numpy only; `tokenizers` is imported when a tokenizer is made, torch never."""

from research.data.batches import (
    Batch,
    Sampler,
    StreamSampler,
    validation_batches,
)
from research.data.prepare import (
    Corpus,
    check,
    load,
)
from research.data.run_tokenizer import load_tokenizer
from research.data.token_store import TokenStore
from research.data.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "Sampler",
    "StreamSampler",
    "TokenStore",
    "Tokenizer",
    "check",
    "load",
    "load_tokenizer",
    "validation_batches",
]
