"""Filling in a middle: the prompt is that of training, and only a run that was trained so gets one."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from parallel.grid import Grid
from research import __main__ as research_main
from research.config import serialization
from research.config.examples import FillInMiddle
from research.data import special_tokens, tokenizer
from research.data.fill_in_middle import FillInMiddleExamples, Sentinels
from research.data.token_store import TokenStore, write
from research.generation.infilling import infilling_prompt, trained_sentinels
from research.generation.restore import DecoderSpec, restored
from research.tracking.own_runs import mark_as_own
from tests.models.helpers.decoding import logits_of
from tests.research.helpers import untrained


@pytest.fixture(scope="module")
def own():
    return tokenizer.fixed("builtin:bytes+fim")


def run_of(examples=None, init_from=None):
    return SimpleNamespace(data=SimpleNamespace(examples=examples), init_from=init_from)


def test_sentinels_are_those_of_the_examples_or_of_imported_weights(own):
    examples = FillInMiddle(rate=0.5, spm_rate=0.5, confine=True, prefix="<fim_suffix>", suffix="<fim_prefix>")
    assert trained_sentinels(run_of(examples), own) == Sentinels(258, 257, 259)
    assert trained_sentinels(run_of("stream"), own) is None
    assert trained_sentinels(run_of("stream", "runs/x/y/checkpoints/step_0"), own) == Sentinels(257, 258, 259)
    assert trained_sentinels(run_of("stream", "runs/x/y/checkpoints/step_0"), tokenizer.fixed(tokenizer.BYTES)) is None


@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
def test_a_prompt_is_the_beginning_of_a_sample_of_training(own, tmp_path, spm_rate):
    text = "def add(a, b):\n    return a + b\n"
    write(tmp_path / "one", [(np.array([*own.encode(text), own.end_of_text]), 1)] * 6, own.vocab_size, {})
    names = dict(zip(("prefix", "suffix", "middle"), special_tokens.FIM, strict=True))
    one = FillInMiddleExamples(TokenStore(tmp_path / "one"), own, 120, 3, rate=1.0, spm_rate=spm_rate, confine=False, **names)
    seen = own.decode(one.rows(np.array([0]), np.array([0])).ids[0])
    sentinels = trained_sentinels(run_of(FillInMiddle(rate=1.0, spm_rate=spm_rate, confine=False)), own)
    # the sample is the prompt of a cut and the text between; in SPM it does not show where the prefix ends
    found = []
    for first, last in [(i, j) for i in range(len(text) + 1) for j in range(i, len(text) + 1)]:
        prompt = own.decode(infilling_prompt(own, sentinels, own.encode(text[:first]), own.encode(text[last:])))
        found += [(first, last)] if seen.startswith(prompt + text[first:last] + own.decode([own.end_of_text])) else []
    assert found and found == (found[:1] if not spm_rate else [(first, found[0][1]) for first in range(found[0][1] + 1)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of random weights that seems to be imported, with sentinels among its tokens."""
    place = tmp_path_factory.mktemp("fim")
    made = untrained.make(place)
    experiment = serialization.load(made.config)
    experiment.data.tokenizer = "builtin:bytes+fim"
    experiment.init_from = "elsewhere"
    serialization.save(experiment, made.config)
    mark_as_own(made)
    return made


@pytest.fixture
def generate(folder, capfd):
    def run(*words, code=0, where=folder):
        assert research_main.main(["generate", str(where.path), *words]) == code
        captured = capfd.readouterr()
        return captured.err if code else captured.out

    return run


def test_the_middle_is_what_the_model_writes_after_the_prompt(folder, own, generate):
    row = json.loads(generate("--fim", "the people", " war", "--max_new_tokens", "9", "--json"))
    assert (row["prompt"], row["suffix"], row["prompt_tokens"]) == ("the people", " war", 10 + 4 + 3)
    prompt = [257, *b"the people", 258, *b" war", 259]
    module, model = restored(DecoderSpec(folder.path, folder.checkpoints / "step_000003"), Grid()), serialization.load(folder.config).model
    ids = list(prompt)
    for _ in row["ids"]:
        ids.append(int(logits_of(module, model, ids)[: own.vocab_size].argmax()))
    assert row["ids"] == ids[len(prompt) :]
    assert generate("--fim", "the people", " war", "--max_new_tokens", "9") == row["text"] + "\n"


def test_a_middle_ends_at_a_sentinel(folder, own, monkeypatch, generate):
    """The first token of the text is taken for a sentinel: nothing is written."""
    asked = ("--fim", "the people", " war", "--max_new_tokens", "9", "--json")
    prompt, first = (257, *b"the people", 258, *b" war", 259), json.loads(generate(*asked))["ids"][0]
    assert own.decode([first])
    monkeypatch.setattr("research.cli.generate.infilling.trained_sentinels", lambda *_: Sentinels(257, first, 259))
    monkeypatch.setattr("research.cli.generate.infilling.infilling_prompt", lambda *_: prompt)
    ended = json.loads(generate(*asked))
    assert (ended["ids"], ended["finish"], ended["text"]) == ([first], "end_of_text", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "x"], "--prompt and --fim are given → give one of --prompt TEXT, --file FILE, --fim PREFIX SUFFIX and --interactive"),
        (["--beams", "2"], "--fim does not go with --beams 2"),
        (["--max_new_tokens", "40"], "a prompt of 5 tokens with max_new_tokens = 40 needs 45 places"),
    ],
)
def test_what_does_not_go_together(words, message, generate):
    assert message in generate("--fim", "a", "b", *words, code=2)


def test_a_run_that_was_not_trained_so_is_refused(tmp_path, generate):
    said = generate("--fim", "a", "b", code=2, where=untrained.make(tmp_path))
    assert "was not trained to fill in a middle" in said and "→ continue the prefix alone with --prompt" in said
    assert "is not UTF-8" in generate("--fim", "a", "\udcff", code=2)
