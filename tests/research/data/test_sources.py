"""Several sources: what is read of each, what is held out, and which changes leave the samples so far where they were."""

import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from parallel.errors import Mistake
from research.data import documents, prepare, sources
from research.data.blend import Blend
from research.data.prepare import SHARED
from research.data.run_tokenizer import load_tokenizer

SAMPLES_OF_A_STEP = 700


def source(name, weight=1.0, from_step=0, validation=None, path=None):
    return types.SimpleNamespace(path=path or f"{name}.txt", weight=weight, from_step=from_step, name=name, validation=validation)


ENTRIES = st.lists(
    st.builds(source, st.sampled_from("abc"), st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.sampled_from([0, 0, 2, 5])),
    min_size=1,
    max_size=6,
    unique_by=lambda entry: (entry.name, entry.from_step),
).filter(lambda train: all(any(sources.weights_in(train, step).values()) for step in sources.changes(train)))


@given(ENTRIES, ENTRIES, st.integers(1, 7))
@examples(max_examples=40, deadline=None)
def test_what_may_change_leaves_every_sample_so_far_where_it_was(then, now, step) -> None:
    """Compared with the blends themselves. Half of the pairs are made to agree at the beginning."""
    for new in (now, then + [entry for entry in now if entry.from_step >= step and entry.name not in {one.name for one in then}]):
        blends = [Blend(list(sources.training_texts(train)), sources.stages(train, SAMPLES_OF_A_STEP.__mul__), 7) for train in (then, new)]
        places = [blend.place(np.arange(SAMPLES_OF_A_STEP * step)) for blend in blends]
        names = [np.array(blend.names)[place.sources] for blend, place in zip(blends, places, strict=True)]
        equal = np.array_equal(*names) and np.array_equal(places[0].numbers, places[1].numbers)
        assert equal or not sources.same_until(then, new, step)
    assert sources.same_until(then, new, step), "a source that begins later changes nothing before"


def test_a_change_before_the_step_is_not_the_same():
    then = [source("a"), source("b")]
    assert sources.same_until(then, then, 9) and sources.same_until("a.txt", "a.txt", 9) and not sources.same_until("a.txt", then, 9)
    for now in ([source("b"), source("a")], [source("a")], [source("a", 2.0), source("b")], [source("a", path="x"), source("b")]):
        assert not sources.same_until(then, now, 9)
    assert not sources.same_until(then, [*then, source("a", 2.0, from_step=8)], 9)
    assert sources.same_until(then, [*then, source("a", 2.0, from_step=9), source("c", from_step=10)], 9)


@pytest.fixture
def mixed(settings, lines):
    """The training text of `settings`, and another one, as sources."""
    lines("more.jsonl", [f"another document {i}" for i in range(10)])
    settings.train = (source("one", path=settings.train), source("two", 0.5, path="more.jsonl"))
    settings.tokenizer = "builtin:bytes"
    return settings


def test_each_source_has_a_store_of_its_own(mixed, tmp_path):
    corpus = prepare.load(mixed, tmp_path, 300)
    for name, path in (("one", "train.jsonl"), ("two", "more.jsonl")):
        mixed.train = path
        assert corpus.sources[name].tokens.tolist() == prepare.load(mixed, tmp_path, 300).train.tokens.tolist()
    assert list(corpus.sources) == ["one", "two"] and list(corpus.held_out) == [SHARED]
    with pytest.raises(ValueError):
        _ = corpus.train


def test_the_fingerprint_is_that_of_all_sources_or_of_those_that_are_asked_for(mixed, tmp_path, lines):
    corpus, both = prepare.load(mixed, tmp_path, 300), mixed.train
    mixed.train = "train.jsonl"
    alone = prepare.load(mixed, tmp_path, 300)
    assert corpus.fingerprint_of(["one"]) == alone.fingerprint != corpus.fingerprint
    mixed.train = both[::-1]
    assert prepare.load(mixed, tmp_path, 300).fingerprint != corpus.fingerprint, "the order of samples depends on that of the sources"
    lines("more.jsonl", ["changed"])
    mixed.train = both
    changed = prepare.load(mixed, tmp_path, 300)
    assert changed.fingerprint != corpus.fingerprint and changed.fingerprint_of(["one"]) == alone.fingerprint


def test_what_is_held_out_of_each_source(mixed, tmp_path, lines):
    lines("own.jsonl", ["held out of two"])
    mixed.train[1].validation = "own.jsonl"
    corpus = prepare.load(mixed, tmp_path, 300)
    assert {name: store.num_documents for name, store in corpus.held_out.items()} == {SHARED: 3, "two": 1}

    mixed.validation = "split:0.2"
    with pytest.raises(Mistake, match=r"'split:0.2' holds a part of each source out, and 'two' names .* 'own.jsonl' → use one of the two"):
        prepare.load(mixed, tmp_path, 300)
    mixed.train[1].validation = None
    split = prepare.load(mixed, tmp_path, 300)
    assert {name: store.num_documents for name, store in split.sources.items()} == {"one": 16, "two": 8}
    assert {name: store.num_documents for name, store in split.held_out.items()} == {"one": 4, "two": 2}
    mixed.train[0].name = "train"  # as of train.txt: it is a source like any other
    assert list(prepare.load(mixed, tmp_path, 300).held_out) == ["train", "two"]
    mixed.train[0].name = "one"
    texts = prepare.held_out_texts(split, 20)
    assert [(text.source, text.tokens) for text in texts] == [("one", 20), ("two", 20)]
    found = prepare.held_out_stores(mixed, mixed.validation, tmp_path, split.tokenizer)
    assert [store.tokens.tolist() for store in found] == [store.tokens.tolist() for store in split.held_out.values()]
    with pytest.raises(Mistake, match=r"'split:0.2' leaves \d+ tokens to the validation part, a sample of model.seq_length = 60 needs 61"):
        prepare.refuse_short_parts(mixed, split, 60)


def test_a_held_out_text_that_is_a_copy_of_a_source_is_refused(mixed, tmp_path):
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "more.jsonl").read_bytes())
    mixed.validation = "copy.jsonl"
    corpus = prepare.load(mixed, tmp_path, 300)
    with pytest.raises(Mistake, match=r"'copy.jsonl' has the same content as the source 'two' of data.train → name"):
        prepare.refuse_same_text(mixed, corpus)


def test_a_tokenizer_is_trained_on_all_sources(mixed, tmp_path):
    mixed.tokenizer = "builtin:chars"
    texts = [text for name in ("train.jsonl", "more.jsonl") for text in documents.documents(name, tmp_path)]
    assert load_tokenizer(mixed, tmp_path).vocab_size == len(set("".join(texts))) + 1


def test_several_files_are_one_text(settings, tmp_path, lines):
    lines("more.jsonl", [f"another document {i}" for i in range(10)])
    (tmp_path / "plain.txt").write_text("and plain text")
    settings.train, settings.tokenizer = ("train.jsonl", "more.jsonl", "plain.txt"), "builtin:bytes"
    store = prepare.load(settings, tmp_path, 300).train
    texts = [text for name in settings.train for text in documents.documents(name, tmp_path)]
    expected = [byte for text in texts for byte in (*text.encode(), 256)]
    assert store.tokens.tolist() == expected and store.facts["source"] == "train.jsonl, more.jsonl and 1 more"
    settings.train = ("train.jsonl", "store:mine")
    with pytest.raises(Mistake, match=r"lists 'store:mine': a store is not read as one text with others → give each Source\(path="):
        prepare.load(settings, tmp_path, 300)
    settings.train = ("train.jsonl", "missing.txt")
    with pytest.raises(Mistake, match=r"data.train = 'missing.txt'"):
        prepare.load(settings, tmp_path, 300)
