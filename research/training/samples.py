"""What a model is to write while it trains: the prompts and how its tokens are chosen, checked as early as they can be."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.inference.sampling_params import SamplingParams
from parallel.errors import Mistake
from research.config import Experiment
from research.data.prepare import Corpus, tokenizer_at_hand
from research.data.tokenizer import Tokenizer
from research.generation import prompts
from research.tracking import format as fmt

PROMPT_TOKENS = 8
"""Where no prompt is given, the model continues so many tokens of the held-out text."""


def check_samples(experiment: Experiment, root: Path) -> None:
    """Refuse before torch is imported what can be known by then: of a tokenizer that is still to be trained, no prompt's length."""
    asked = experiment.sample
    sampling_params_of(experiment)
    for prompt in asked.prompts:
        prompts.check(prompt)
    length = experiment.model.seq_length
    if not (asked.every and asked.prompts):
        return
    if asked.tokens >= length:
        raise Mistake(f"sample.tokens = {asked.tokens} leaves no room for a prompt in model.seq_length = {length} → use fewer")
    if tokenizer := tokenizer_at_hand(experiment.data, root):
        refuse_long(experiment, asked.prompts, tokenizer)


def sampling_params_of(experiment: Experiment) -> SamplingParams:
    """How a next token is chosen."""
    try:
        return SamplingParams(**{field.name: getattr(experiment.sample, field.name) for field in dataclasses.fields(SamplingParams)})
    except Mistake as mistake:
        raise Mistake(f"sample.{mistake}") from None


def refuse_long(experiment: Experiment, given: Sequence[str], tokenizer: Tokenizer) -> None:
    """A Mistake where a prompt and what is to follow are longer than what the model is trained on."""
    tokens, length = experiment.sample.tokens, experiment.model.seq_length
    for prompt in given:
        size = len(tokenizer.prompt(prompt))
        if size + tokens > length:
            ways = f"use sample.tokens {length - size} or less, or shorten it" if size < length else "shorten it"
            raise Mistake(
                f"sample.prompts: {fmt.one_line(prompt)[:40]!r} has {size} tokens, with sample.tokens = {tokens} that is {size + tokens}, "
                f"more than model.seq_length = {length} → {ways}"
            )


def first_words(words: Corpus) -> str:
    """How the held-out text begins, on one line, so that it can be typed."""
    return fmt.one_line(words.tokenizer.decode(words.validation.tokens[:PROMPT_TOKENS].tolist()))


def prompts_of(experiment: Experiment, words: Corpus) -> tuple[str, ...]:
    """What is continued at every interval; nothing where there are no intervals. A Mistake where it is too long."""
    if not experiment.sample.every:
        return ()
    refuse_long(experiment, experiment.sample.prompts, words.tokenizer)
    return experiment.sample.prompts or (first_words(words),)


def row(axes: dict[str, Any], prompt: str, written: str, finish: str | None) -> dict[str, Any]:
    """A line of samples.jsonl."""
    own = {axis: axes[axis] for axis in ("progress/step", "progress/tokens")}
    return {**own, "prompt": prompt, "text": written, "finish": finish}
