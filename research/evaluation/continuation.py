"""A context and what may follow it, as tokens: cut apart where lm-evaluation-harness cuts them, so that the figures are comparable."""

from parallel.errors import Mistake
from research.data.tokenizer import Tokenizer
from research.scorer import Asked


def continuation(tokenizer: Tokenizer, context: str, following: str, length: int, where: str = "a text") -> Asked:
    """`following`, to be scored after `context`; of a context that is too long its end. After end-of-text where the context is empty.

    White space at the context's end belongs to what follows. Both are tokenized as one text, and the cut is after as many tokens
    as the context has alone. A Mistake where nothing is left to score or it does not fit.
    """
    before, after = pair(tokenizer, context, following)
    if not after:
        raise Mistake(f"{where}: {following!r} adds no token to its context → give it text of its own")
    if len(after) >= length:
        raise Mistake(f"{where}: {len(after)} tokens are to be scored, the model takes {length - 1} → shorten the text")
    return Asked(tuple((before + after)[-length:]), len(after))


def pair(tokenizer: Tokenizer, context: str, following: str) -> tuple[list[int], list[int]]:
    """The context's tokens and those that follow it."""
    if not context:
        ids = tokenizer.encode(following)
        own = ids[:1] == [tokenizer.end_of_text]
        return ([tokenizer.end_of_text], ids[1:] if own else ids)
    stripped = context.rstrip()
    whole, alone = tokenizer.encode(context + following), tokenizer.encode(stripped)
    return whole[: len(alone)], whole[len(alone) :]
