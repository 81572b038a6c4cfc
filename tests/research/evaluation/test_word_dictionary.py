"""IBM model 1: one step of expectation maximisation by hand, many against a plain loop over its definition, and what it translates."""

from collections import defaultdict
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.evaluation.word_dictionary import WordDictionary

PAIRS = [("the house", "das Haus"), ("the book", "das Buch"), ("a book", "ein Buch")]


def table(found: WordDictionary) -> dict[tuple[str, str], float]:
    names, words = list(found.sources), list(found.targets)
    return {(names[e], words[f]): t for e, f, t in zip(found.source_of.tolist(), found.target_of.tolist(), found.t.tolist(), strict=True)}


def test_two_steps_by_hand():
    """At first every word of a source has a third of each word of its target: "the" has 2/3 of das, 1/3 of Haus, 1/3 of Buch."""
    first = table(WordDictionary(PAIRS, rounds=1))
    expected = {"the": {"das": 1 / 2, "Haus": 1 / 4, "Buch": 1 / 4}, "house": {"das": 1 / 2, "Haus": 1 / 2}}
    expected |= {"book": {"das": 1 / 4, "Buch": 1 / 2, "ein": 1 / 4}, "a": {"ein": 1 / 2, "Buch": 1 / 2}}
    expected |= {"": {"das": 2 / 6, "Haus": 1 / 6, "Buch": 2 / 6, "ein": 1 / 6}}
    assert first == {(e, f): pytest.approx(t) for e, row in expected.items() for f, t in row.items()}
    # then "house" has 1/2 of (1/2 + 1/4 + 1/6) of Haus, and 1/2 of (1/2 + 1/2 + 1/3) of das
    second = table(WordDictionary(PAIRS, rounds=2))
    assert second["house", "Haus"] == pytest.approx((6 / 11) / (6 / 11 + 3 / 8))


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6))
def test_steps_are_those_of_the_definition(pairs):
    found = table(WordDictionary([(" ".join(e), " ".join(f)) for e, f in pairs], rounds=3))
    t = defaultdict(lambda: Fraction(1))
    for _ in range(3):
        counts, totals = defaultdict(Fraction), defaultdict(Fraction)
        for e, f in pairs:
            for target in f:
                norm = sum(t[source, target] for source in ["", *e])
                for source in ["", *e]:
                    counts[source, target] += t[source, target] / norm
                    totals[source] += t[source, target] / norm
        t = {key: count / totals[key[0]] for key, count in counts.items()}
    assert found == {key: pytest.approx(float(value)) for key, value in t.items()}


def test_translation_word_by_word():
    found = WordDictionary(PAIRS * 3)
    assert found.translated("The house, a BOOK: <unknown>!") == "Das Haus, ein Buch: <unknown>!"
    assert found.translated("") == "" and found.translated("x the") == "x das"
    assert WordDictionary([]).translated("The house") == "The house" and WordDictionary([("x", "…")]).translated("x") == "x"
