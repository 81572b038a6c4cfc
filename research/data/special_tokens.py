"""Special tokens that a built-in tokenizer is given by its name: builtin:bpe-8192+fim, builtin:gpt2+fim, builtin:bytes+spans+mask.

They follow the other tokens, in the order of their sets, so that the ids of a text are those of the tokenizer without them. Each name has
letters and signs beside each other, which GPT-2's pattern separates: no merge of a byte-level BPE can make one of them from text.
"""

from parallel.errors import Mistake

PLUS = "+"
FIM = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
"""The names of StarCoder (arXiv:2305.06161)."""
SPANS = tuple(f"<extra_id_{number}>" for number in range(100))
"""The names of T5 (arXiv:1910.10683)."""
MASK = ("<mask>",)
SEPARATOR = "<sep>"
"""Between the source and the target of a pair."""
SETS = {"fim": FIM, "spans": SPANS, "mask": MASK, "sep": (SEPARATOR,)}


def parted(name: str) -> tuple[str, tuple[str, ...]]:
    """('builtin:bpe-8192', the names of its special tokens) for 'builtin:bpe-8192+fim'. A Mistake if there is no such set."""
    base, *chosen = name.split(PLUS)
    for one in chosen:
        if one not in SETS:
            known = ", ".join(f"{base}+{each}" for each in SETS)
            raise Mistake(f"data.tokenizer = {name!r} names special tokens that are not known, {one!r} → use {known}, or several of them")
    return base, tuple(token for one in dict.fromkeys(chosen) for token in SETS[one])
