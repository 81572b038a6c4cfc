"""SamplingParams: how the next token is chosen from a model's logits. Imports no torch.

The meanings and the order are those of transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

import math
from dataclasses import dataclass

from parallel.errors import Mistake


@dataclass(frozen=True)
class SamplingParams:
    """The default is greedy. A value without a meaning, or without an effect, is a Mistake."""

    temperature: float = 0.0
    """Divides the logits before the softmax. 0: greedy, always the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens (and those as likely as the last of them) are sampled from. 0: all."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability are sampled from. 1: all."""
    min_p: float = 0.0
    """Only tokens with at least this fraction of the most likely token's probability are sampled from. 0: all."""
    repetition_penalty: float = 1.0
    """Logits of tokens of the prompt and of the text so far are divided by this if positive, else multiplied. 1: no penalty."""

    def __post_init__(self) -> None:
        for name, works, instead in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more, 1 is the model's own distribution"),
            ("top_k", self.top_k >= 0, "1 or more, 0 for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1, which is all tokens"),
            ("min_p", 0 <= self.min_p <= 1, "0, which is all tokens, to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "more than 0; 1 is none, 1.1 discourages"),
        ):
            if not works:
                raise Mistake(f"{name} = {getattr(self, name)} does not work → use {instead}")
        for name in ("top_k", "top_p", "min_p"):
            if self.greedy and getattr(self, name) != getattr(SamplingParams, name):
                raise Mistake(f"{name} = {getattr(self, name)} has no effect at temperature = 0, which is greedy → set temperature, e.g. 1")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken, so that nothing is drawn."""
        return self.temperature == 0


GREEDY = SamplingParams()
