"""Checks, before a stranger's tokenizer.json is used, that its normaliser, decoder and patterns cannot make much of little text.

A `Replace` of "a" by a text of a megabyte makes gigabytes of a line; several in a row multiply. A pattern such as (a{1000}){1000}
takes gigabytes when it is compiled. Real tokenizers replace a space by "▁". What such a pattern does in time is bounded by the limits
of the process that converts it (research/cluster/limited_process.py). Imports nothing heavy.
"""

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from parallel.errors import Mistake

MOST_GROWTH = 1000
"""The most bytes that a normaliser or decoder may make of one."""
UNICODE_GROWTH = 18
"""The most characters that Unicode's normal forms, and SentencePiece's tables for them, make of one (U+FDFA)."""
GROWING = {"NFC": 3, "NFD": 4, "NFKC": UNICODE_GROWTH, "NFKD": UNICODE_GROWTH, "Precompiled": UNICODE_GROWTH, "Lowercase": 3}
LONGEST_PATTERN, MOST_REPETITIONS = 20_000, 100_000
"""Of one regular expression: its characters, and the product of the numbers of its {…}."""
MOST_PATTERNS, MOST_PATTERN_LETTERS = 1000, 100_000
"""The most regular expressions, and characters of all of them together. Real tokenizers have a dozen."""
REPETITION = re.compile(r"\{\s*+(?:\d*+\s*+,)?+\s*+(\d++)\s*+\}")
"""Its quantifiers give nothing back (`*+`), so that a pattern of "{" and blanks is looked at once, not once for each blank."""
LONGEST_PART = 1000
"""The most characters of the unknown token, and of what is put before or behind the parts of a word."""
MOST_ADDED, MOST_ADDED_LETTERS, MOST_PIECES = 2**15, 2**23, 1000
"""The most added tokens (the library takes longer for each; Gemma has 6,000), characters of all of them together, and pieces of the
template that puts special tokens around a text."""
PARTS = ("normalizer", "pre_tokenizer", "decoder", "post_processor")
"""The components that may hold regular expressions."""
WAY_OUT = "do not use it, or name another tokenizer"


def check(table: dict[str, Any], path: Path) -> None:
    """Raises a Mistake for a tokenizer.json whose table says that it would take much memory or never end."""
    try:
        for part in ("normalizer", "decoder"):
            if (growth := _growth(table.get(part))) > MOST_GROWTH:
                raise Mistake(f"{path}: its {part} makes up to {growth:,.0f} bytes of one, more than {MOST_GROWTH:,} → {WAY_OUT}")
        patterns = [(part, pattern) for part in PARTS for pattern in _patterns(table.get(part))]
        if (pieces := _pieces(table.get("post_processor"))) > MOST_PIECES:
            raise Mistake(f"{path}: its post_processor has {pieces:,} pieces, more than {MOST_PIECES:,} → {WAY_OUT}")
    except RecursionError:
        raise Mistake(f"{path} is nested too deeply → {WAY_OUT}") from None
    _check_patterns(patterns, path)
    model = table.get("model")
    for name, value in model.items() if isinstance(model, dict) else ():
        if isinstance(value, str) and len(value) > LONGEST_PART:  # a prefix or suffix of every token
            raise Mistake(f"{path}: its model's {name:.40} has {len(value):,} characters, more than {LONGEST_PART:,} → {WAY_OUT}")
    added = table.get("added_tokens")
    entries = added if isinstance(added, list) else []
    if len(entries) > MOST_ADDED:
        raise Mistake(f"{path} has {len(entries):,} added tokens, more than {MOST_ADDED:,} → {WAY_OUT}")
    letters = sum(len(entry["content"]) for entry in entries if isinstance(entry, dict) and isinstance(entry.get("content"), str))
    if letters > MOST_ADDED_LETTERS:
        raise Mistake(f"{path}: its added tokens have {letters:,} characters, more than {MOST_ADDED_LETTERS:,} → {WAY_OUT}")


def _growth(component: Any) -> float:
    """How many bytes a normaliser or decoder may make of one byte."""
    if not isinstance(component, dict):
        return 1.0
    inner = [entry for name in ("normalizers", "decoders") if isinstance(component.get(name), list) for entry in component[name]]
    own = float(GROWING.get(str(component.get("type")), 1))
    content, pattern = component.get("content"), component.get("pattern")
    if isinstance(content, str):  # Replace; a regular expression may match nothing, before every character
        matched = pattern.get("String") if isinstance(pattern, dict) else pattern
        made = len(content.encode("utf-8", "replace"))
        own = max(1.0, made / len(matched.encode("utf-8", "replace"))) if isinstance(matched, str) and matched else made + 1.0
    if isinstance(prepended := component.get("prepend"), str):
        own = 1.0 + len(prepended)
    return prod(map(_growth, inner), start=own)


def _pieces(component: Any) -> int:
    """The pieces of the templates of a post-processor."""
    if not isinstance(component, dict):
        return 0
    own = [component[name] for name in ("single", "pair") if isinstance(component.get(name), list)]
    inner = component.get("processors")
    return sum(map(len, own)) + sum(map(_pieces, inner if isinstance(inner, list) else []))


def _patterns(component: Any) -> Iterator[str]:
    """The regular expressions anywhere in a component."""
    if isinstance(component, dict):
        if isinstance(regex := component.get("Regex"), str):
            yield regex
        for value in component.values():
            yield from _patterns(value)
    elif isinstance(component, list):
        for value in component:
            yield from _patterns(value)


def _check_patterns(patterns: list[tuple[str, str]], path: Path) -> None:
    """Raises a Mistake for a regular expression, or for all of them together, that would take much to compile. (part, pattern) of each."""
    if len(patterns) > MOST_PATTERNS:
        raise Mistake(f"{path} has {len(patterns):,} patterns, more than {MOST_PATTERNS:,} → {WAY_OUT}")
    for part, pattern in patterns:
        if len(pattern) > LONGEST_PATTERN:
            raise Mistake(f"{path}: a pattern of its {part} has {len(pattern):,} characters, more than {LONGEST_PATTERN:,} → {WAY_OUT}")
    if (letters := sum(len(pattern) for _, pattern in patterns)) > MOST_PATTERN_LETTERS:
        raise Mistake(f"{path}: its patterns have {letters:,} characters, more than {MOST_PATTERN_LETTERS:,} → {WAY_OUT}")
    for part, pattern in patterns:
        repetitions = prod(max(1, int(number[:12])) for number in REPETITION.findall(pattern))
        if repetitions > MOST_REPETITIONS:
            raise Mistake(f"{path}: a pattern of its {part} repeats {repetitions:,.4g} times, more than {MOST_REPETITIONS:,} → {WAY_OUT}")
