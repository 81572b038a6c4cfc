"""Masked language modelling: as many tokens in each sample, 80/10/10 among them, and only where the loss counts."""

import numpy as np
import pytest

from research.config.examples import Masked
from research.data import tokenizer
from research.data.masked_lm import MaskedExamples
from research.data.token_store import TokenStore, write
from tests.research.helpers.example import sentence


@pytest.fixture(scope="module")
def own():
    return tokenizer.fixed("builtin:bytes+mask")


@pytest.fixture(scope="module")
def store(own, tmp_path_factory):
    generator, prefix = np.random.default_rng(0), tmp_path_factory.mktemp("store") / "one"
    write(prefix, ((np.append(generator.integers(0, 256, 99), own.end_of_text), 99) for _ in range(1000)), own.vocab_size, {})
    return TokenStore(prefix)


def examples_of(store, own, seq_length=128, seed=1, **changes):
    return MaskedExamples(store, own, seq_length, seed, **Masked(**{"rate": 0.15} | changes).model_dump(exclude={"kind"}))


def test_what_is_replaced_counts_and_the_targets_are_the_tokens(store, own):
    one = examples_of(store, own)
    assert (one.drawn, one.size) == (19, 100_000 // 128)  # 0.15 · 128 = 19.2
    ids, targets, counts, *_ = one.rows(np.arange(one.size), np.zeros(one.size, int))
    assert (targets.ravel() == store.tokens[: one.size * 128]).all()
    assert (counts.sum(1) == one.drawn).all() and (one.counted(np.arange(5), np.zeros(5, int)) == one.drawn).all()
    assert (ids[~counts] == targets[~counts]).all() and not counts[targets == own.end_of_text].any()

    drawn, number = ids[counts], counts.sum()
    masked, same = (drawn == one.mask), (drawn == targets[counts])
    others = drawn[~masked & ~same]
    for share, found in ((0.8, masked.sum()), (0.1, same.sum()), (0.1, len(others))):
        assert abs(found - share * number) < 4 * np.sqrt(number * share * (1 - share)) + number * 0.1 / 256
    assert len(np.unique(others)) > 250  # of 258
    places = counts[:,][targets != own.end_of_text].sum() / (targets != own.end_of_text).sum()
    assert places == pytest.approx(19 / 128 * 100 / 99, rel=0.01)
    by_place = counts.sum(0)
    assert abs(by_place - one.size * 19 / 128).max() < 5 * np.sqrt(one.size * 0.15 * 0.85)


def test_a_sample_depends_on_seed_number_and_epoch_alone(store, own):
    one, numbers = examples_of(store, own), np.arange(20)
    first, second = (one.rows(numbers, np.full(20, epoch)).ids for epoch in (0, 1))
    mixed = examples_of(store, own).rows(np.concatenate([numbers[::-1], numbers]), np.repeat([1, 0], 20)).ids
    assert (mixed[:20][::-1] == second).all() and (mixed[20:] == first).all()
    assert (first != second).any(1).all() and (examples_of(store, own, seed=2).rows(numbers, numbers * 0).ids != first).any(1).all()


def test_a_sample_of_ends_alone_has_as_many(tmp_path, own):
    write(tmp_path / "ends", ((np.array([own.end_of_text]), 0) for _ in range(64)), own.vocab_size, {})
    assert (examples_of(TokenStore(tmp_path / "ends"), own, 32).rows(np.arange(2), np.zeros(2, int)).counts.sum(1) == 5).all()


def test_mistakes(store, own):
    assert "no special token '<m>'" in sentence(lambda: examples_of(store, own, mask="<m>"))
    assert "no special token 'a'" in sentence(lambda: examples_of(store, own, mask="a"))
    assert "one has 100000 → use a smaller model.seq_length" in sentence(lambda: examples_of(store, own, 100_001))
    assert "data.examples.rate = 1 does not work → use a finite number greater than 0 and below 1" in sentence(
        lambda: examples_of(store, own, rate=1)
    )


def test_half_of_the_sentences_are_in_the_wrong_order_and_say_so(store, own):
    one, plain, numbers = examples_of(store, own, 127, sentence_order=True), examples_of(store, own, 127), np.arange(700)
    rows, before = one.rows(numbers, numbers * 0), plain.rows(numbers, numbers * 0)
    assert before.sentences is None and before.token_types is None
    assert abs(rows.sentences.mean() - 0.5) < 4 * 0.5 / np.sqrt(700)
    for i in numbers[:50]:
        swapped = rows.sentences[i]
        first, second = before.targets[i, :64], before.targets[i, 64:]
        assert (rows.targets[i] == np.concatenate([second, first] if swapped else [first, second])).all()
        assert (rows.token_types[i] == ([0] * 63 + [1] * 64 if swapped else [0] * 64 + [1] * 63)).all()
    assert (rows.counts.sum(1) == one.drawn).all() and (rows.ids[~rows.counts] == rows.targets[~rows.counts]).all()
    again = one.rows(numbers[::-1], numbers * 0)
    assert (again.sentences[::-1] == rows.sentences).all() and (one.rows(numbers, numbers * 0 + 1).sentences != rows.sentences).any()
