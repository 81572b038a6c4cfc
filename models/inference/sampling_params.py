"""How a next token is chosen from a model's logits: the settings, and what they must be. Pure data: no torch.

Meanings and order are transformers': repetition penalty, temperature, top-k, top-p, min-p.
"""

import math
from dataclasses import dataclass

from parallel.errors import Mistake


@dataclass(frozen=True)
class SamplingParams:
    """Greedy by default. A value that means nothing is a Mistake."""

    temperature: float = 0.0
    """Divides the logits before the softmax; 0: the likeliest token, always."""
    top_k: int = 0
    """Only the k likeliest tokens (and those as likely as the last of them); 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability, the one that reaches it included; 1: all."""
    min_p: float = 0.0
    """Only tokens with at least this part of the likeliest one's probability; 0: all."""
    repetition_penalty: float = 1.0
    """A logit of a token that was there before, in the prompt too: divided by this if positive, else multiplied; 1: as it is."""

    def __post_init__(self) -> None:
        _refuse(self, "temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more, 1 is the model's own distribution")
        _refuse(self, "top_k", self.top_k >= 0, "1 or more, 0 for all tokens")
        _refuse(self, "top_p", 0 < self.top_p <= 1, "more than 0 and at most 1, which is all tokens")
        _refuse(self, "min_p", 0 <= self.min_p <= 1, "0, which is all tokens, to 1")
        _refuse(self, "repetition_penalty", 0 < self.repetition_penalty < math.inf, "more than 0; 1 is none, 1.1 discourages")
        for name in ("top_k", "top_p", "min_p"):
            if self.greedy and getattr(self, name) != getattr(SamplingParams, name):
                raise Mistake(f"{name} = {getattr(self, name)} has no effect at temperature = 0, which is greedy → set temperature, e.g. 1")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


def _refuse(choice: SamplingParams, name: str, works: bool, what: str) -> None:
    if not works:
        raise Mistake(f"{name} = {getattr(choice, name)} does not work → use {what}")


GREEDY = SamplingParams()
