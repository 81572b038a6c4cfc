"""Prompts longer than the context: what is left out of them if a request says `truncation = "auto"`.

The field is that of OpenAI's /v1/responses. Without it, such a prompt is rejected, as OpenAI's completion endpoints do.
"""

from bisect import bisect_left
from collections.abc import Callable
from functools import cache

Messages = list[dict[str, str]]
Ids = tuple[int, ...]

MOST_CHARACTERS = 16
"""The most characters for each token of the room, blanks around a message not counted, of turns that are tokenized to see whether they
fit. English text has four to five characters per token, code up to ten."""


def prompt_places(context: int, max_tokens: int | None) -> int:
    """The most tokens of a prompt: as many places as the text may have stay free, or half of the context if that is less."""
    half = context // 2
    return context - min(max_tokens or half, half)


def latest_messages(messages: Messages, encode: Callable[[Messages], Ids], places: int) -> tuple[Ids, int]:
    """The tokens of the newest turns that fit into `places`, and the number of messages left out.

    A turn begins with a user's message. The last turn always stays, and so do the system messages at the beginning. Twice as many turns
    are tried as long as they fit, so that the time depends on the room more than on the length of the conversation.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    later_turns = (i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user")
    newest_first = [first, *later_turns][::-1]

    @cache
    def ids(start: int) -> Ids:
        return encode(messages[:first] + messages[start:])

    def is_too_long(start: int) -> bool:
        characters = sum(len(message["content"].strip()) for message in messages[start:])
        return characters > MOST_CHARACTERS * places or len(ids(start)) > places

    turns = 1
    while 2 * turns <= len(newest_first) and not is_too_long(newest_first[2 * turns - 1]):
        turns *= 2
    fitting = bisect_left(newest_first, True, turns, min(2 * turns, len(newest_first)), key=is_too_long)
    start = newest_first[fitting - 1]
    return ids(start), start - first


def latest_tokens(ids: Ids, begin: Ids, places: int) -> Ids:
    """The last `places` tokens; those that the tokenizer puts in front of every prompt stay there."""
    if len(ids) <= places:
        return ids
    front = begin if ids[: len(begin)] == begin else ()
    kept = max(places - len(front), 1)
    return front + ids[-kept:]
