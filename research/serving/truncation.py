"""Prompts longer than the context: what is left out of them if a request says `truncation = "auto"`.

The field is that of OpenAI's /v1/responses. Without it, such a prompt is rejected, as OpenAI's completion endpoints do.
"""

from bisect import bisect_left
from collections.abc import Callable
from functools import cache

Messages = list[dict[str, str]]
Ids = tuple[int, ...]


def prompt_places(context: int, max_tokens: int | None) -> int:
    """The most tokens of a prompt: as many places as the text may have stay free, or half of the context if that is less."""
    half = context // 2
    return context - min(max_tokens or half, half)


def latest_messages(messages: Messages, encode: Callable[[Messages], Ids], places: int) -> tuple[Ids, int]:
    """The tokens of the newest turns that fit into `places`, and the number of messages left out.

    A turn begins with a user's message. The last turn always stays, and so do the system messages at the beginning.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    later_turns = (i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user")
    starts = [first, *later_turns]

    @cache
    def ids(start: int) -> Ids:
        return encode(messages[:first] + messages[start:])

    fitting = bisect_left(starts, True, key=lambda start: len(ids(start)) <= places)
    start = starts[min(fitting, len(starts) - 1)]
    return ids(start), start - first


def latest_tokens(ids: Ids, begin: Ids, places: int) -> Ids:
    """The last `places` tokens; those that the tokenizer puts in front of every prompt stay there."""
    if len(ids) <= places:
        return ids
    front = begin if ids[: len(begin)] == begin else ()
    kept = max(places - len(front), 1)
    return front + ids[-kept:]
