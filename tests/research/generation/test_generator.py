"""Prompts become texts: streamed, stopped, ended, cancelled, searched; the same whatever is written beside them."""
# MERGED-DOC """Text comes as soon as it is certain, whole characters only, never past a stop string; together it is what the ids say."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from models.inference.sampling_params import SamplingParams
from parallel.errors import Mistake
from parallel.grid import Grid
from research.config import serialization
from research.data import tokenizer
from research.data.prepare import load_tokenizer
from research.data.tokenizer import Tokenizer
from research.generation.generator import IncrementalDetokenizer, TextGenerator, row
from research.generation.restore import DecoderSpec, decoder_of
from research.generation.settings import GenerationSettings
from research.tracking.run_folder import RunFolder
from tests.models.helpers.build import ROTARY
from tests.research.helpers import untrained

STOPS = ["ab", "abc", "ba", "a\nb", "é", "€x", "  ", "cab"]


@pytest.fixture(scope="module")
def gpt2() -> tokenizer.Tokenizer:
    return tokenizer.gpt2()


class Bytes:
    """A tokenizer with an id for every byte."""

    def decode(self, ids) -> str:
        return bytes(ids).decode(errors="replace")


class Spaces:
    """A tokenizer that drops a space at the very beginning of a text, as SentencePiece's do."""

    WORDS = ("▁My", "▁fellow", "▁citizens", ",", "▁▁", "s")

    def decode(self, ids) -> str:
        return "".join(self.WORDS[i] for i in ids).replace("▁", " ").removeprefix(" ")


def streamed(stream: IncrementalDetokenizer, ids) -> list[str]:
    """What each id, and then the end, gives out; ids after a stop are not pushed."""
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


def test_a_character_in_two_tokens_comes_whole():
    """½ is C2 BD, € is E2 82 AC, 😀 is F0 9F 98 80."""
    pieces = streamed(IncrementalDetokenizer(Bytes(), []), "a½€😀b".encode())
    assert pieces == ["a", "", "½", "", "", "€", "", "", "", "😀", "b", ""]


def test_a_character_left_unfinished_is_left_out():
    assert streamed(IncrementalDetokenizer(Bytes(), []), b"ab\xe2\x82") == ["a", "b", "", "", ""]


def test_bytes_that_never_become_a_character_are_given_out_all_the_same():
    pieces = streamed(IncrementalDetokenizer(Bytes(), []), [0xFF] * 20 + list(b"ab"))
    assert "".join(pieces).endswith("ab") and "".join(pieces).count("\N{REPLACEMENT CHARACTER}") == 20
    assert any(pieces[:10])


def test_a_space_at_the_beginning_of_the_new_text_stays():
    assert streamed(IncrementalDetokenizer(Spaces(), [0]), [1, 2, 3, 4, 5]) == [" fellow", " citizens", ",", "  ", "s", ""]
    assert streamed(IncrementalDetokenizer(Spaces(), []), [0, 1]) == ["My", " fellow", ""]


def test_random_ids_of_a_real_tokenizer_add_up(gpt2):
    """Whatever the ids: what is given out is the text of all, but for a last unfinished character."""
    rng = random.Random(0)
    for _ in range(30):
        ids = gpt2.encode("".join(rng.choice("ab ½€😀\nü漢") for _ in range(40)))
        assert "".join(streamed(IncrementalDetokenizer(gpt2, gpt2.encode("My fellow")), ids)) == gpt2.decode(ids)


def test_a_stop_string_across_tokens_ends_the_text_before_it(gpt2):
    ids = gpt2.encode("one two\n\nThree four")
    assert "".join(streamed(IncrementalDetokenizer(gpt2, [], ["\nThr"]), ids)) == "one two\n"
    assert "".join(streamed(IncrementalDetokenizer(gpt2, [], ["never there"]), ids)) == "one two\n\nThree four"


def test_text_that_may_begin_a_stop_string_is_held_back():
    assert streamed(IncrementalDetokenizer(Bytes(), [], ["END"]), b"an EXTRA EN") == [
        "a",
        "n",
        " ",
        "",
        "EX",
        "T",
        "R",
        "A",
        " ",
        "",
        "",
        "EN",
    ]
    stream = IncrementalDetokenizer(Bytes(), [], ["END"])
    assert streamed(stream, b"the END.") == ["t", "h", "e", " ", "", "", ""] and stream.stopped


def test_the_earliest_stop_string_counts():
    assert "".join(streamed(IncrementalDetokenizer(Bytes(), [], ["cd", "bcx", "c"]), b"abcd")) == "ab"


def test_any_text_and_any_stops_give_the_text_up_to_the_first():
    """Random texts cut into random tokens, against str.find on the whole."""
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choice("abcé€ \n") for _ in range(rng.randint(1, 30)))
        stops = rng.sample(STOPS, rng.randint(0, 3))
        found = [at for at in map(text.find, stops) if at >= 0]
        stream = IncrementalDetokenizer(Bytes(), [], stops)
        assert "".join(streamed(stream, text.encode())) == text[: min(found, default=None)], (text, stops)
        assert stream.stopped == bool(found)


CPU = torch.device("cpu")
DRAWN = GenerationSettings(20, SamplingParams(temperature=1.0), seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> RunFolder:
    return untrained.make(tmp_path_factory.mktemp("writer"), **ROTARY)


def writer(folder: RunFolder, slots: int = 4) -> TextGenerator:
    experiment = serialization.load(folder.config)
    plan = DecoderSpec(folder.path, folder.checkpoints / "step_000003", slots=slots, context=32)
    return TextGenerator(decoder_of(plan, Grid(), CPU), load_tokenizer(experiment.data, Path("/")), experiment.model, 32)


def whole(writer: TextGenerator, prompt: str, ask: GenerationSettings) -> str:
    text = writer.submit(prompt, ask)
    while writer:
        writer.step()
    return text.text


def said(tokenizer: Tokenizer, ids) -> str:
    """The text of the ids, less a character that they leave unfinished: random weights write random bytes."""
    return tokenizer.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")


def test_pieces_add_up_to_the_text(folder):
    mine = writer(folder)
    texts, pieces = [mine.submit(prompt, DRAWN) for prompt in ("the people", "war", "")], {}
    while mine:
        for text in mine.step():
            pieces[text] = pieces.get(text, "") + text.fresh
    for text in texts:
        ids = text.written.ids
        assert pieces[text] == text.text
        assert text.text == said(mine.tokenizer, ids[:-1] if text.finish == "end_of_text" else ids)
        assert text.finish == "end_of_text" or len(ids) == 20


def test_a_text_does_not_depend_on_its_company(folder):
    alone, crowded = writer(folder, 1), writer(folder, 3)
    prompts = ["the people", "war", "peace", "", "jobs — ½", "the budget of the union"]
    asks = [dataclasses.replace(DRAWN, seed=seed) for seed in range(6)]
    texts = [crowded.submit(prompt, ask) for prompt, ask in zip(prompts, asks, strict=True)]
    while crowded:
        crowded.step()
    assert [text.text for text in texts] == [whole(alone, prompt, ask) for prompt, ask in zip(prompts, asks, strict=True)]


def test_an_empty_prompt_begins_a_document(folder):
    mine = writer(folder)
    assert mine.ids("") == (mine.tokenizer.end_of_text,)


def test_a_stop_string_ends_the_text_before_it_and_frees_the_row(folder):
    mine = writer(folder)
    free = whole(mine, "the people", DRAWN)
    stop = free[7:10]
    text = mine.submit("the people", dataclasses.replace(DRAWN, stops=("never", stop)))
    while mine:
        mine.step()
    assert (text.text, text.finish) == (free[: free.index(stop)], "stop")
    assert mine.decoder.free == 4 and len(text.written.ids) < 20


def test_a_stop_string_in_the_very_last_token(folder):
    """It counts as stop, not as length: every prefix of a text whose last token says something new."""
    mine, tried = writer(folder), 0
    free = mine.submit("the people", DRAWN)
    while mine:
        mine.step()
    for count in range(2, 20):
        before, after = (mine.tokenizer.decode(free.written.ids[:n]) for n in (count - 1, count))
        last = after[len(before) :]
        if "\N{REPLACEMENT CHARACTER}" in after[-1:] + before[-1:] or last in before:
            continue
        text = mine.submit("the people", dataclasses.replace(DRAWN, max_new_tokens=count, stops=(last,)))
        while mine:
            mine.step()
        assert (text.text, text.finish, len(text.written.ids)) == (before, "stop", count)
        tried += 1
    assert tried > 3


def test_a_cancelled_text_leaves_the_others_alone(folder):
    mine = writer(folder, 2)
    texts = [mine.submit(prompt, DRAWN) for prompt in ("war", "the people", "jobs")]
    mine.step()
    mine.step()
    mine.cancel(texts[0])
    mine.cancel(texts[2])
    mine.cancel(texts[2])  # once more is no matter
    while mine:
        mine.step()
    assert [text.finish for text in texts[::2]] == ["cancelled"] * 2
    assert texts[1].text == whole(writer(folder, 1), "the people", DRAWN)


def test_the_end_of_text_ends_a_text_and_is_not_in_it(folder):
    """A tokenizer that calls the fourth greedy token the end."""
    mine = writer(folder, 1)
    ids = mine.submit("the people", GenerationSettings(12)).written
    while mine:
        mine.step()
    end = ids.ids[3]
    tokenizer = dataclasses.replace(mine.tokenizer, end_of_text=end)
    ended = TextGenerator(mine.decoder, tokenizer, mine.model, 32)
    text = ended.submit("the people", GenerationSettings(12))
    while ended:
        ended.step()
    assert text.finish == "end_of_text" and text.written.ids == ids.ids[: ids.ids.index(end) + 1]
    assert text.text == said(tokenizer, text.written.ids[:-1])


def test_a_text_ends_at_any_of_the_ids_that_end_it(folder):
    """Those of the writer, or of a request that was given as ids."""
    mine = writer(folder)
    ids = mine.ids("the people")
    whole_text = mine.submit("the people", GenerationSettings(12))
    while mine:
        mine.step()
    end = whole_text.written.ids[3]
    cut = whole_text.written.ids.index(end) + 1
    by_request = mine.submit_ids(ids, GenerationSettings(12), (-1, end))
    while mine:
        mine.step()
    ended = TextGenerator(mine.decoder, mine.tokenizer, mine.model, 32, (-1, end))
    by_writer = ended.submit("the people", GenerationSettings(12))
    while ended:
        ended.step()
    for text in (by_request, by_writer):
        assert text.finish == "end_of_text" and text.written.ids == whole_text.written.ids[:cut]


def test_starts_say_where_in_the_text_each_token_begins(folder):
    """Beside the text of the tokens before it, decoded at once; a token inside of a character begins where the character does."""
    mine = writer(folder)
    text = mine.submit("the people", GenerationSettings(20, stops=("never there",)))
    while mine:
        mine.step()
    assert len(text.starts) == 20 and text.starts[0] == 0 and text.starts == sorted(text.starts)
    for i, start in enumerate(text.starts):
        before = mine.tokenizer.decode(text.written.ids[:i])
        assert before.rstrip("\N{REPLACEMENT CHARACTER}") == before[:start].rstrip("\N{REPLACEMENT CHARACTER}")


def test_a_writer_that_was_cleared_is_as_new(folder):
    mine = writer(folder)
    for prompt in ("war", "the people", "", "war", "war"):
        mine.submit(prompt, DRAWN)
    mine.step()
    mine.clear()
    assert not mine and mine.decoder.free == 4
    assert whole(mine, "the people", DRAWN) == whole(writer(folder), "the people", DRAWN)


def test_a_prompt_that_is_too_long_is_refused_and_nothing_waits(folder):
    mine = writer(folder)
    with pytest.raises(Mistake, match="needs 33 places, the context has 32"):
        mine.submit("", GenerationSettings(32))
    assert not mine


def test_beams_are_texts_with_scores(folder):
    mine = writer(folder)
    found = mine.search("the people", GenerationSettings(6), beams=4, count=2)
    assert len(found) == 2 and found[0].score >= found[1].score
    assert [text.finish for text in found] == ["length"] * 2
    assert all(text.text == said(mine.tokenizer, text.written.ids) for text in found)
    assert mine.decoder.free == 4


def test_a_row_of_json_says_everything(folder):
    mine = writer(folder)
    text = mine.submit("the people", dataclasses.replace(DRAWN, max_new_tokens=3, logprobs=2))
    while mine:
        mine.step()
    found = row(text, mine.tokenizer)
    assert list(found) == ["prompt", "text", "finish", "prompt_tokens", "ids", "logprobs"]
    assert (found["prompt"], found["text"], found["ids"]) == ("the people", text.text, text.written.ids)
    assert found["prompt_tokens"] == len(mine.tokenizer.encode("the people"))
    assert [each["id"] for each in found["logprobs"]] == found["ids"] and all(len(each["top"]) == 2 for each in found["logprobs"])
    assert all(each["token"] == mine.tokenizer.decode([each["id"]]) for each in found["logprobs"])
    (beam,) = mine.search("the people", GenerationSettings(3), beams=2, count=1)
    assert row(beam, mine.tokenizer)["score"] == beam.score
