"""Splits of one text by whole documents: 'split:969,30,1', Megatron-LM's shares of training, validation and test, or 'split:0.05'.

A text of one document is split by position, with the same rule for tokens. `prepare --split` draws documents at random instead:
random_split.py.
"""

import math
from itertools import accumulate, pairwise

from parallel.errors import Mistake, listed
from research.data.token_store import TokenStore

SPLIT = "split:"
PARTS = ("training", "validation", "test")
EXAMPLES = "'split:969,30,1' (training, validation, test) or 'split:0.05' (the last 5 % are held out)"


def is_split(spec: str) -> bool:
    """Whether data.validation names a part of data.train rather than a text of its own."""
    return spec.startswith(SPLIT)


def shares(spec: str) -> list[float]:
    """The parts of 1 that training, validation and test get. One number alone is the held-out part. Anything else is a Mistake."""
    words = spec.removeprefix(SPLIT).split(",")
    try:
        weights = [float(word) for word in words]
    except ValueError:
        weights = [-1.0]
    if len(weights) == 1 and 0 < weights[0] < 1:
        weights = [1 - weights[0], weights[0]]
    if not 2 <= len(weights) <= len(PARTS) or not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise Mistake(f"data.validation = {spec!r} is not two or three shares, or one between 0 and 1 → write {EXAMPLES}")
    if not (weights[0] and weights[1]):
        raise Mistake(f"data.validation = {spec!r} gives the {PARTS[bool(weights[0])]} part nothing → write {EXAMPLES}")
    return [weight / sum(weights) for weight in weights + [0.0] * (len(PARTS) - len(weights))]


def borders(spec: str, documents: int) -> list[int]:
    """[0, a, b, c]: the parts are documents 0 to a, a to b and b to c. Megatron-LM's rule: sums of shares, times documents, rounded."""
    return [round(border * documents) for border in accumulate(shares(spec), initial=0.0)]


def split(store: TokenStore, spec: str, name: str) -> list[TokenStore]:
    """The training, validation and test part of the store of `name`. A Mistake if a part that has a share has no document.

    The parts of a single document have `first_token` among their facts.
    """
    if store.num_documents == 1:
        return [store.piece(begin, end) for begin, end in pairwise(borders(spec, store.num_tokens))]
    ends = borders(spec, store.num_documents)
    sizes = [end - begin for begin, end in pairwise(ends)]
    for part, share, size in zip(PARTS, shares(spec), sizes, strict=True):
        if share and not size:
            raise Mistake(
                f"data.validation = {spec!r} leaves no document to the {part} part: {name!r} has {store.num_documents} documents, which "
                f"become {listed(sizes, 'and')} → give that part a larger share{' or none' * (part == PARTS[2])}, or use more documents"
            )
    return [store.part(begin, end) for begin, end in pairwise(ends)]


def refuse_short(spec: str, train: TokenStore, validation: TokenStore, seq_length: int) -> None:
    """Raises a Mistake if the training or the validation part of a split is shorter than one sample."""
    for part, store in zip(PARTS, (train, validation), strict=False):
        if store.num_tokens <= seq_length:
            raise Mistake(
                f"data.validation = {spec!r} leaves {store.num_tokens} tokens to the {part} part, a sample of model.seq_length = "
                f"{seq_length} needs {seq_length + 1} → give that part a larger share, or use more text"
            )
