"""Generated text: streamed in complete characters that add up to the text of the ids, stopped, ended, cancelled, searched by beams.

A text is the same whatever is generated beside it.
"""

import dataclasses
import functools
import random
from pathlib import Path

import pytest
import torch

from models.inference.sampling_params import SamplingParams
from parallel.errors import Mistake
from parallel.grid import Grid
from research.config import serialization
from research.data import tokenizer as tokenizers
from research.data.run_tokenizer import load_tokenizer
from research.data.tokenizer import Tokenizer
from research.generation.generator import GeneratedText, IncrementalDetokenizer, TextGenerator, as_json
from research.generation.restore import DecoderSpec
from research.generation.settings import GenerationSettings
from research.tracking.run_folder import RunFolder
from tests.models.helpers.build import ROTARY
from tests.research.helpers import untrained

CPU = torch.device("cpu")
DRAWN = GenerationSettings(20, SamplingParams(temperature=1.0), seed=5)
STOPS = ["ab", "abc", "ba", "a\nb", "é", "€x", "  ", "cab"]


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return tokenizers.gpt2()


class Bytes:
    """A tokenizer with an id for every byte."""

    def decode(self, ids) -> str:
        return bytes(ids).decode(errors="replace")


class Spaces:
    """A tokenizer that drops a space at the very beginning of a text, as SentencePiece's do."""

    WORDS = ("▁My", "▁fellow", "▁citizens", ",", "▁▁", "s")

    def decode(self, ids) -> str:
        return "".join(self.WORDS[i] for i in ids).replace("▁", " ").removeprefix(" ")


def streamed(detokenizer: IncrementalDetokenizer, ids) -> list[str]:
    """What `push` returns for each id, and then `finish`; ids after a stop string are not pushed."""
    pieces = []
    for token in ids:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            return pieces
    return [*pieces, detokenizer.finish()]


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
    """Whatever the ids: the pieces add up to the text of all of them."""
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
    detokenizer = IncrementalDetokenizer(Bytes(), [], ["END"])
    assert streamed(detokenizer, b"the END.") == ["t", "h", "e", " ", "", "", ""] and detokenizer.stopped


def test_the_earliest_stop_string_counts():
    assert "".join(streamed(IncrementalDetokenizer(Bytes(), [], ["cd", "bcx", "c"]), b"abcd")) == "ab"


def test_any_text_and_any_stops_give_the_text_up_to_the_first():
    """Random texts cut into random tokens, against str.find on the whole."""
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choice("abcé€ \n") for _ in range(rng.randint(1, 30)))
        stops = rng.sample(STOPS, rng.randint(0, 3))
        starts = [start for start in map(text.find, stops) if start >= 0]
        detokenizer = IncrementalDetokenizer(Bytes(), [], stops)
        assert "".join(streamed(detokenizer, text.encode())) == text[: min(starts, default=None)], (text, stops)
        assert detokenizer.stopped == bool(starts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> RunFolder:
    return untrained.make(tmp_path_factory.mktemp("generator"), **ROTARY)


@pytest.fixture(scope="module")
def new_generator(folder):
    """slots -> a generator without texts. The restored models are shared; each test gets an empty one."""
    experiment = serialization.load(folder.config)
    tokenizer = load_tokenizer(experiment.data, Path("/"))

    @functools.cache
    def decoder(slots: int):
        return DecoderSpec(folder.path, folder.checkpoints / "step_000003", slots=slots, context=32).on(Grid(), CPU)

    def new(slots: int = 4) -> TextGenerator:
        decoder(slots).clear()
        return TextGenerator(decoder(slots), tokenizer, experiment.model, 32)

    return new


@pytest.fixture
def generator(new_generator) -> TextGenerator:
    return new_generator()


def run(generator: TextGenerator) -> None:
    while generator:
        generator.step()


def generate(generator: TextGenerator, prompt: str, settings: GenerationSettings) -> GeneratedText:
    text = generator.submit(prompt, settings)
    run(generator)
    return text


def decoded(tokenizer: Tokenizer, ids) -> str:
    """The text of the ids without an incomplete character at its end: random weights generate random bytes."""
    return tokenizer.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")


def test_pieces_add_up_to_the_text(generator):
    texts, pieces = [generator.submit(prompt, DRAWN) for prompt in ("the people", "war", "")], {}
    while generator:
        for text in generator.step():
            pieces[text] = pieces.get(text, "") + text.fresh
    for text in texts:
        ids = text.generation.ids
        assert pieces[text] == text.text
        assert text.text == decoded(generator.tokenizer, ids[:-1] if text.finish == "end_of_text" else ids)
        assert text.finish == "end_of_text" or len(ids) == 20


def test_a_text_does_not_depend_on_the_texts_beside_it(new_generator):
    alone, crowded = new_generator(1), new_generator(3)
    prompts = ["the people", "war", "peace", "", "jobs — ½", "the budget of the union"]
    settings = [dataclasses.replace(DRAWN, seed=seed) for seed in range(6)]
    texts = [crowded.submit(prompt, one) for prompt, one in zip(prompts, settings, strict=True)]
    run(crowded)
    assert [text.text for text in texts] == [generate(alone, prompt, one).text for prompt, one in zip(prompts, settings, strict=True)]


def test_an_empty_prompt_begins_a_document(generator):
    text = generator.submit("", DRAWN)
    assert text.generation.request.prompt == (generator.tokenizer.end_of_text,)


def test_a_stop_string_ends_the_text_before_it_and_frees_the_row(generator):
    free = generate(generator, "the people", DRAWN).text
    stop = free[7:10]
    text = generate(generator, "the people", dataclasses.replace(DRAWN, stops=("never", stop)))
    assert (text.text, text.finish) == (free[: free.index(stop)], "stop")
    assert generator.decoder.free == 4 and len(text.generation.ids) < 20


def test_a_stop_string_in_the_very_last_token(generator):
    """The reason is stop, not length: for every prefix of a text whose last token is not in the text before it."""
    tried, free = 0, generate(generator, "the people", DRAWN).generation.ids
    for count in range(2, 20):
        before, after = (generator.tokenizer.decode(free[:n]) for n in (count - 1, count))
        last = after[len(before) :]
        if "\N{REPLACEMENT CHARACTER}" in after[-1:] + before[-1:] or last in before:
            continue
        text = generate(generator, "the people", dataclasses.replace(DRAWN, max_new_tokens=count, stops=(last,)))
        assert (text.text, text.finish, len(text.generation.ids)) == (before, "stop", count)
        tried += 1
    assert tried > 3


def test_a_cancelled_text_leaves_the_others_alone(new_generator):
    generator = new_generator(2)
    texts = [generator.submit(prompt, DRAWN) for prompt in ("war", "the people", "jobs")]
    generator.step()
    generator.step()
    generator.cancel(texts[0])
    generator.cancel(texts[2])
    generator.cancel(texts[2])  # cancelling twice does nothing
    run(generator)
    assert [text.finish for text in texts[::2]] == ["cancelled"] * 2
    assert texts[1].text == generate(new_generator(1), "the people", DRAWN).text


def test_the_end_of_text_ends_a_text_and_is_not_in_it(generator):
    """With a tokenizer whose end-of-text is the fourth greedy token."""
    free = generate(generator, "the people", GenerationSettings(12)).generation.ids
    tokenizer = dataclasses.replace(generator.tokenizer, end_of_text=free[3])
    text = generate(TextGenerator(generator.decoder, tokenizer, generator.model, 32), "the people", GenerationSettings(12))
    assert text.finish == "end_of_text" and text.generation.ids == free[: free.index(free[3]) + 1]
    assert text.text == decoded(tokenizer, text.generation.ids[:-1])


def test_a_text_ends_at_any_of_the_ids_that_end_it(generator):
    """The end ids of the generator, or of a request that is made of ids."""
    ids, settings = generator.tokenizer.prompt("the people"), GenerationSettings(12)
    free = generate(generator, "the people", settings).generation.ids
    by_request = generator.submit_ids(ids, settings, (-1, free[3]))
    run(generator)
    ended = TextGenerator(generator.decoder, generator.tokenizer, generator.model, 32, (-1, free[3]))
    for text in (by_request, generate(ended, "the people", settings)):
        assert text.finish == "end_of_text" and text.generation.ids == free[: free.index(free[3]) + 1]


def test_starts_say_where_in_the_text_each_token_begins(generator):
    """Compared with the decoded text of the tokens before it; a token inside a character begins where the character does."""
    text = generate(generator, "the people", GenerationSettings(20, stops=("never there",)))
    assert len(text.starts) == 20 and text.starts[0] == 0 and text.starts == sorted(text.starts)
    for i, start in enumerate(text.starts):
        before = generator.tokenizer.decode(text.generation.ids[:i])
        assert before.rstrip("\N{REPLACEMENT CHARACTER}") == before[:start].rstrip("\N{REPLACEMENT CHARACTER}")


def test_a_cleared_generator_is_like_a_new_one(folder, generator):
    for prompt in ("war", "the people", "", "war", "war"):
        generator.submit(prompt, DRAWN)
    generator.step()
    generator.clear()
    assert not generator and generator.decoder.free == 4
    new = DecoderSpec(folder.path, folder.checkpoints / "step_000003", slots=4, context=32).on(Grid(), CPU)
    expected = generate(TextGenerator(new, generator.tokenizer, generator.model, 32), "the people", DRAWN)
    assert generate(generator, "the people", DRAWN).text == expected.text


def test_a_prompt_that_is_too_long_is_refused_and_nothing_waits(generator):
    with pytest.raises(Mistake, match="needs 33 places, the context has 32"):
        generator.submit("", GenerationSettings(32))
    assert not generator


def test_beams_are_texts_with_scores(generator):
    texts = generator.search("the people", GenerationSettings(6), beams=4, count=2)
    assert len(texts) == 2 and texts[0].score >= texts[1].score
    assert [text.finish for text in texts] == ["length"] * 2
    assert all(text.text == decoded(generator.tokenizer, text.generation.ids) for text in texts)
    assert generator.decoder.free == 4


def test_a_text_as_json(generator):
    tokenizer = generator.tokenizer
    text = generate(generator, "the people", dataclasses.replace(DRAWN, max_new_tokens=3, logprobs=2))
    record = as_json(text, tokenizer)
    assert list(record) == ["prompt", "text", "finish", "prompt_tokens", "ids", "logprobs"]
    assert (record["prompt"], record["text"], record["ids"]) == ("the people", text.text, text.generation.ids)
    assert record["prompt_tokens"] == len(tokenizer.encode("the people"))
    assert [each["id"] for each in record["logprobs"]] == record["ids"] and all(len(each["top"]) == 2 for each in record["logprobs"])
    assert all(each["token"] == tokenizer.decode([each["id"]]) for each in record["logprobs"])
    (beam,) = generator.search("the people", GenerationSettings(3), beams=2, count=1)
    assert as_json(beam, tokenizer)["score"] == beam.score
