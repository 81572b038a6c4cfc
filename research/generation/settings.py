"""The settings of a generation, checked when they are made, and whether a prompt fits into a context. Imports no torch."""

from dataclasses import dataclass

from models.config import GPT
from models.encoder_config import T5
from models.inference.sampling_params import GREEDY, SamplingParams
from models.seed import seed_of
from parallel.errors import Mistake

MOST_LOGPROBS = 100
DEFAULT_TOKENS = 64


@dataclass(frozen=True)
class GenerationSettings:
    """How many tokens to generate after a prompt, how to sample them, where to stop, and what to record."""

    max_new_tokens: int = DEFAULT_TOKENS
    sampling: SamplingParams = GREEDY
    seed: int = 0
    """Decides every draw: the same seed gives the same text."""
    stops: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    logprobs: int | None = None
    """How many of the most likely tokens to record beside each generated one; 0: the generated one only; None: record nothing."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise Mistake(f"max_new_tokens = {self.max_new_tokens} does not work → use 1 or more")
        if "" in self.stops:
            raise Mistake("a stop string is empty, and would stop every text at its beginning → leave it out")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise Mistake(f"logprobs = {self.logprobs} does not work → use 0 (the written token alone) to {MOST_LOGPROBS}")


def text_seed(seed: int, prompt: int, text: int) -> int:
    """The seed of text number `text` of prompt number `prompt`, derived from a command's `seed`. Depends on these three numbers only."""
    return seed_of(seed, f"prompt {prompt}, text {text}")


def refuse_long(prompt: int, max_new_tokens: int, context: int, model: GPT | T5) -> None:
    """Raises a Mistake if a prompt of `prompt` tokens and the tokens to generate do not fit into `context` places of the cache.

    The prompt of an encoder–decoder is its source, which has model.source_length places of its own.
    """
    if isinstance(model, T5):
        if prompt > model.source_length:
            raise Mistake(f"a source of {prompt} tokens is longer than model.source_length = {model.source_length} → shorten it")
        if max_new_tokens > context:
            raise Mistake(f"max_new_tokens = {max_new_tokens} is more than the {context} places of a target → use {context} or less")
        return
    if prompt + max_new_tokens <= context:
        return
    need = f"a prompt of {prompt} tokens with max_new_tokens = {max_new_tokens} needs {prompt + max_new_tokens} places"
    ways = [f"use max_new_tokens {context - prompt} or less"] if prompt < context else ["shorten the prompt"]
    if can_be_longer(model):
        ways.append(f"use context {prompt + max_new_tokens}")
    raise Mistake(f"{need}, the context has {context} and does not slide → {', or '.join(ways)}")


def refuse_context(context: int, model: GPT | T5) -> None:
    """Raises a Mistake if the model has no positions for a context of this length."""
    if context < 2:
        raise Mistake(f"context = {context} does not work → use 2 tokens or more, the model was trained on {model.seq_length}")
    if context > model.seq_length and not can_be_longer(model):
        raise Mistake(f"context = {context} is longer than the positions learned, model.seq_length = {model.seq_length} → use that or less")


def can_be_longer(model: GPT | T5) -> bool:
    """Whether the model can run on more tokens than it was trained on, whatever the quality. False for a position class of variant.py."""
    return model.position in ("sinusoidal", "rotary", "alibi", "relative", "none")
