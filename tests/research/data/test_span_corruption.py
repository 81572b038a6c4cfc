"""Span corruption: T5's lengths and form, derived again here from its published code, and nothing of the text is lost."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.config.examples import Spans
from research.data import special_tokens, tokenizer
from research.data.draws import random_keys
from research.data.span_corruption import SpanExamples, _divided, lengths_of
from research.data.token_store import TokenStore, write
from tests.research.helpers.example import sentence


@pytest.fixture(scope="module")
def own():
    return tokenizer.fixed("builtin:bytes+spans")


@pytest.fixture(scope="module")
def store(own, tmp_path_factory):
    generator, prefix = np.random.default_rng(0), tmp_path_factory.mktemp("store") / "one"
    write(prefix, ((np.append(generator.integers(0, 256, 99), own.end_of_text), 99) for _ in range(300)), own.vocab_size, {})
    return TokenStore(prefix)


def examples_of(store, own, source_length=100, seed=1, seq_length=400, start_token=None, **changes):
    chosen = Spans(**{"rate": 0.15, "mean_length": 3.0} | changes).model_dump(exclude={"kind"})
    return SpanExamples(store, own, seq_length, seed, source_length=source_length, start_token=start_token, **chosen)


def t5_lengths(inputs_length, density, mean):
    """`random_spans_helper` of text-to-text-transfer-transformer: (tokens, targets_length), each sequence with its end."""

    def of(tokens):
        noise = int(round(tokens * density))
        spans = int(round(noise / mean))
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = inputs_length
    while of(tokens + 1)[0] <= inputs_length:
        tokens += 1
    return tokens, of(tokens)[1]


@pytest.mark.parametrize("length", [32, 100, 128, 500, 512, 1024])
@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.15, 2.0), (0.25, 8.0), (0.1, 5.0)])
def test_lengths_are_those_of_t5(length, density, mean):
    found = lengths_of(length, density, mean)
    assert (found.tokens, found.target, found.source) == (*t5_lengths(length, density, mean), length)


def test_the_paper_s_lengths():
    """arXiv:1910.10683, section 3.1.4: sequences of 512 tokens. T5's own constants: 568 tokens give 512 and 114."""
    assert lengths_of(512, 0.15, 3.0)[::4] == (568, 114)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(8, 300), rate=st.floats(0.05, 0.9), mean=st.floats(1, 12), epoch=st.integers(0, 2**31), seed=st.integers(0, 2**32)
)
def test_undoing_the_corruption_gives_the_tokens_back(length, rate, mean, epoch, seed, own, store):
    spans = lengths_of(length, rate, mean).spans
    if spans > len(special_tokens.SPANS):
        return
    one = examples_of(store, own, length, seed, seq_length=4000, rate=rate, mean_length=mean)
    numbers = np.arange(min(one.size, 4))
    source, target = one.pairs(numbers, np.full(len(numbers), epoch))
    assert source.shape[1] == one.lengths.source <= length and target.shape[1] == one.lengths.target
    for number, kept, noise in zip(numbers.tolist(), source.tolist(), target.tolist(), strict=True):
        assert kept.pop() == noise.pop() == own.end_of_text
        spans_of = iter(_split(noise, one.sentinels))
        assert next(spans_of) == []
        found = [token for token in kept for token in (next(spans_of) if token in one.sentinels else [token])]
        assert next(spans_of, None) is None and [token for token in kept if token in one.sentinels] == one.sentinels.tolist()
        assert found == store.tokens[number * one.lengths.tokens : (number + 1) * one.lengths.tokens].tolist()


def _split(ids, sentinels):
    """What stands in front of the first sentinel, and behind each. They come in order."""
    borders = [i for i, token in enumerate(ids) if token in sentinels]
    assert [ids[border] for border in borders] == sentinels.tolist()
    return [ids[first + 1 : last] for first, last in itertools.pairwise([-1, *borders, len(ids)])]


def test_every_division_is_as_likely():
    """5 items in 3 runs: the six divisions, in 12,000 draws."""
    numbers = np.arange(12_000)
    runs = _divided(random_keys(7, numbers, count=4), 5, 3)
    found, counts = np.unique(runs, axis=0, return_counts=True)
    assert found.tolist() == [[1, 1, 3], [1, 2, 2], [1, 3, 1], [2, 1, 2], [2, 2, 1], [3, 1, 1]]
    assert abs(counts - 2000).max() < 4 * np.sqrt(12_000 * 5 / 36)


def test_rows_are_the_source_and_the_shifted_target(store, own):
    one, numbers = examples_of(store, own), np.arange(10)
    source, target = one.pairs(numbers, numbers * 0)
    s, t = source.shape[1], target.shape[1]
    ids, targets, counts, segments = one.rows(numbers, numbers * 0)[:4]
    assert ids.shape == segments.shape == (10, 500) and targets.shape == counts.shape == (10, 400) and s == 100 and t == one.lengths.target
    assert (ids[:, :s] == source).all() and (ids[:, 100] == own.end_of_text).all() and (ids[:, 101 : 100 + t] == target[:, :-1]).all()
    assert (targets[:, :t] == target).all() and (counts.sum(1) == one.counted(numbers, numbers)).all()
    assert counts[:, :t].all() and not counts[:, t:].any()
    assert not segments[:, : 100 + t].any() and (segments[:, 100 + t :] == -1).all()
    wide = examples_of(store, own, 8, seq_length=9, rate=0.53, mean_length=1)  # by T5's arithmetic no source has 8 tokens
    ids, segments = wide.rows(numbers, numbers * 0)[:4:3]
    assert wide.lengths[3:] == (7, 8) and (segments == [*[0] * 7, -1, *[0] * 8, -1]).all() and (ids[:, 8] == own.end_of_text).all()
    other = one.pairs(numbers, numbers * 0 + 1).source
    assert (other != source).any(1).all()
    mixed = examples_of(store, own).pairs(np.concatenate([numbers[::-1], numbers]), np.repeat([1, 0], 10)).source
    assert (mixed[:10][::-1] == other).all() and (mixed[10:] == source).all()


def test_mistakes(store, own):
    assert "model.source_length = 2 has no room for a span" in sentence(lambda: examples_of(store, own, 2))
    text = "a source of model.source_length = 100 tokens has 22, more than model.seq_length = 21 → use model.seq_length 22"
    assert text in sentence(lambda: examples_of(store, own, seq_length=21))
    assert examples_of(store, own, seq_length=22).rows(np.arange(2), np.arange(2)).targets.shape == (2, 22)
    assert "and the tokenizer builtin:bytes+spans has no special token '<extra_id_100>'" in sentence(
        lambda: examples_of(store, own, 2500, seq_length=600)
    )
    assert "no special token '<x0>'" in sentence(lambda: examples_of(store, own, sentinels="<x{}>"))
    assert "has no place for a number → write it as <extra_id_{}>" in sentence(lambda: examples_of(store, own, sentinels="<x>"))
    assert "rate = 0 does not work" in sentence(lambda: examples_of(store, own, rate=0))


def test_the_decoder_begins_with_the_start_token(own, store):
    """Of its own, or end-of-text; nothing else depends on it."""
    numbers, epochs = np.arange(3), np.zeros(3, np.int64)
    usual, other = (examples_of(store, own, start_token=token).rows(numbers, epochs) for token in (None, 7))
    assert (usual.ids[:, 100] == own.end_of_text).all() and (other.ids[:, 100] == 7).all()
    other.ids[:, 100] = own.end_of_text
    assert all(np.array_equal(a, b) for a, b in zip(usual, other, strict=True))
