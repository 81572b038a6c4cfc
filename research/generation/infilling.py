"""Prompts for filling in a middle: which sentinels a run was trained with, and the tokens for a prefix and a suffix. Imports no torch."""

from collections.abc import Sequence

from parallel.errors import Mistake
from research.config import Experiment
from research.config.examples import FillInMiddle
from research.data import special_tokens
from research.data.fill_in_middle import Sentinels, SuffixFirst, sentinels_of
from research.data.tokenizer import Tokenizer

KNOWN = (
    special_tokens.FIM,  # StarCoder
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
)
"""The tokens in front of prefix, suffix and middle in published models."""


def trained_sentinels(experiment: Experiment, tokenizer: Tokenizer) -> Sentinels | None:
    """The sentinels that a run was trained with; None if it was not trained to fill in a middle.

    They are those of data.examples = FillInMiddle(…), and ask for the order that most of its rearranged documents had. A run with other
    examples has none, even if its tokenizer does, unless it started from weights that were trained elsewhere (init_from, as every
    import): then they are the tokens of a published model, if it has them.
    """
    examples = experiment.data.examples
    if isinstance(examples, FillInMiddle):
        found = sentinels_of(tokenizer, examples.prefix, examples.suffix, examples.middle)
        return SuffixFirst(*found) if examples.spm_rate > 0.5 else found
    if experiment.init_from is None:
        return None
    for names in KNOWN:
        if all(tokenizer.backend.token_to_id(name) is not None for name in names):
            return sentinels_of(tokenizer, *names)
    return None


def refuse_untrained(sentinels: Sentinels | None, title: str) -> Sentinels:
    """The sentinels; a Mistake if there are none."""
    if sentinels is None:
        raise Mistake(
            f"{title} was not trained to fill in a middle: its data.examples are not FillInMiddle(…) → continue the prefix alone with "
            "--prompt, or train a run with FillInMiddle"
        )
    return sentinels


def infilling_prompt(tokenizer: Tokenizer, sentinels: Sentinels, prefix: Sequence[int], suffix: Sequence[int]) -> tuple[int, ...]:
    """The ids after which a model writes the middle between two texts, in the order that it was trained with."""
    return (*tokenizer.begin, *sentinels.prompt(prefix, suffix))
