"""What is left out of a prompt that is too long: whole turns or the first tokens, never the last turn, compared with trying every cut."""

import random

from research.serving.truncation import latest_messages, latest_tokens, prompt_places


def encode(messages):
    """Two tokens for each message and one for each of its characters."""
    return tuple(ord(letter) for message in messages for letter in f"<{message['content']}>")


def conversation(chance: random.Random) -> list[dict[str, str]]:
    roles = ["system"] * chance.randrange(3) + ["assistant"] * chance.randrange(2)
    for _ in range(chance.randrange(6)):
        roles += chance.choice([["user", "assistant"], ["user"], ["user", "system", "assistant"]])
    return [{"role": role, "content": "x" * chance.randrange(20)} for role in [*roles, "user"]]


def test_the_newest_turns_that_fit():
    chance = random.Random(1)
    for _ in range(300):
        messages, places = conversation(chance), chance.randrange(1, 150)
        ids, left_out = latest_messages(messages, encode, places)
        first = next(i for i, message in enumerate(messages) if message["role"] != "system")
        cuts = [first, *(i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user")]
        tried = [encode(messages[:first] + messages[cut:]) for cut in cuts]
        best = next((i for i, each in enumerate(tried) if len(each) <= places), len(tried) - 1)
        assert (ids, left_out) == (tried[best], cuts[best] - first)


def test_the_time_depends_on_the_room():
    """Whatever the length of the conversation, what is tokenized to find the turns that fit is a few times the room."""
    tokenized = []

    def counted(messages):
        tokenized.append(sum(len(message["content"]) for message in messages))
        return encode(messages)

    turns = [{"role": "user", "content": "x" * 10} for _ in range(1000)]
    assert latest_messages(turns, counted, 240)[1] == 1000 - 20
    assert sum(tokenized) < 10 * 240

    tokenized.clear()
    long, last = {"role": "user", "content": "x" * 100_000}, {"role": "user", "content": "x"}
    assert latest_messages([long, *turns[:6], last], counted, 240)[1] == 1
    assert sum(tokenized) < 10 * 240, "a turn that cannot fit is not tokenized"

    blanks = {"role": "user", "content": "x" + " " * 100_000}

    def stripped(messages):
        return tuple(letter for message in messages for letter in message["content"].strip())

    assert latest_messages([blanks, last], stripped, 240) == (("x", "x"), 0), "blanks may be left out by the template"


def test_a_conversation_without_turns_stays():
    messages = [{"role": "system", "content": "x" * 50}]
    assert latest_messages(messages, encode, 5) == (encode(messages), 0)


def test_the_last_tokens_and_those_that_begin_every_prompt():
    ids = tuple(range(100))
    assert latest_tokens(ids, (), 100) == ids and latest_tokens(ids, (), 7) == ids[-7:]
    assert latest_tokens(ids, (0, 1), 7) == (0, 1, *ids[-5:]) and latest_tokens(ids, (5,), 7) == ids[-7:]
    assert latest_tokens(ids, (0, 1), 2) == (0, 1, 99), "one token of the prompt at least"


def test_the_text_has_room():
    assert [prompt_places(128, most) for most in (None, 1, 20, 64, 65, 5000)] == [64, 127, 108, 64, 64, 64]
    assert prompt_places(2, None) == 1 and prompt_places(3, 9) == 2
