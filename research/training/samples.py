"""Samples that a model writes while it trains: their prompts and sampling parameters, checked before torch is imported where possible."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.inference.sampling_params import SamplingParams
from parallel.errors import Mistake
from research.config import Experiment, Pairs
from research.data.pair_inputs import separator_of
from research.data.prepare import Corpus
from research.data.run_tokenizer import tokenizer_at_hand
from research.data.tokenizer import Tokenizer
from research.generation import prompts
from research.tracking import format as fmt

PROMPT_TOKENS = 8
"""The number of tokens of the held-out text that the model continues if no prompt is given."""


def check_samples(experiment: Experiment, root: Path) -> None:
    """Refuses wrong settings. A prompt's length can be checked only if the tokenizer need not be trained first."""
    settings = experiment.sample
    sampling_params_of(experiment)
    for prompt in settings.prompts:
        prompts.check(prompt)
    length = experiment.model.seq_length
    if not (settings.every and settings.prompts):
        return
    if settings.tokens >= length:
        raise Mistake(f"sample.tokens = {settings.tokens} leaves no room for a prompt in model.seq_length = {length} → use fewer")
    if tokenizer := tokenizer_at_hand(experiment.data, root):
        refuse_long(experiment, settings.prompts, tokenizer)


def sampling_params_of(experiment: Experiment) -> SamplingParams:
    """The sampling parameters of `sample`. Raises a Mistake where they contradict each other."""
    try:
        return SamplingParams(**{field.name: getattr(experiment.sample, field.name) for field in dataclasses.fields(SamplingParams)})
    except Mistake as mistake:
        raise Mistake(f"sample.{mistake}") from None


def refuse_long(experiment: Experiment, texts: Sequence[str], tokenizer: Tokenizer) -> None:
    """Raises a Mistake if a prompt and the tokens to follow are longer than seq_length."""
    tokens, length = experiment.sample.tokens, experiment.model.seq_length
    for prompt in texts:
        size = len(tokenizer.prompt(prompt))
        if size + tokens > length:
            ways = f"use sample.tokens {length - size} or less, or shorten it" if size < length else "shorten it"
            raise Mistake(
                f"sample.prompts: {fmt.one_line(prompt)[:40]!r} has {size} tokens, with sample.tokens = {tokens} that is {size + tokens}, "
                f"more than model.seq_length = {length} → {ways}"
            )


def first_words(corpus: Corpus) -> str:
    """The first tokens of the held-out text, on one line, so that they can be typed."""
    return fmt.one_line(corpus.tokenizer.decode(corpus.validation.tokens[:PROMPT_TOKENS].tolist()))


def first_prompt(experiment: Experiment, corpus: Corpus) -> str:
    """What a sample of the held-out text is written for: its first words, or of pairs the first source, on one line."""
    if not isinstance(experiment.data.examples, Pairs):
        return first_words(corpus)
    begin, end = corpus.validation.document_offsets()[:2].tolist()
    tokens = corpus.validation.tokens[begin:end].tolist()
    separator = separator_of(corpus.tokenizer, experiment.data.examples.separator)
    return fmt.one_line(corpus.tokenizer.decode(tokens[: tokens.index(separator)]))


def prompts_of(experiment: Experiment, corpus: Corpus) -> tuple[str, ...]:
    """The prompts that are continued every sample.every steps; none if that is 0. Raises a Mistake if one is too long."""
    if not experiment.sample.every:
        return ()
    refuse_long(experiment, experiment.sample.prompts, corpus.tokenizer)
    return experiment.sample.prompts or (first_words(corpus),)


def row(axes: dict[str, Any], prompt: str, text: str, finish: str | None) -> dict[str, Any]:
    """A line of samples.jsonl."""
    progress = {axis: axes[axis] for axis in ("progress/step", "progress/tokens")}
    return {**progress, "prompt": prompt, "text": text, "finish": finish}
