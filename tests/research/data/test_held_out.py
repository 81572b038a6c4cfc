"""Held-out samples: each target that counts is predicted once, whatever the layout, and their bytes are those of their text."""

import numpy as np
import pytest

from research.config.examples import Masked
from research.data import tokenizer
from research.data.held_out import held_out_batches, held_out_samples
from research.data.masked_lm import MaskedExamples
from research.data.token_store import TokenStore, write
from tests.research.helpers.example import sentence

TEXT = "der Fluß — 猫, and more of it: def f(x):\n    return x\n" * 30


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> MaskedExamples:
    own, prefix = tokenizer.fixed("builtin:bytes+mask"), tmp_path_factory.mktemp("store") / "one"
    write(prefix, ((np.array([*own.encode(TEXT[i * 9 :]), own.end_of_text]), 1) for i in range(3)), own.vocab_size, {})
    settings = Masked(rate=0.15, sentence_order=True)
    return MaskedExamples(TokenStore(prefix), own, 64, 5, **settings.model_dump(exclude={"kind"}))


def test_every_target_that_counts_is_in_one_batch_on_every_layout(examples) -> None:
    own = tokenizer.fixed("builtin:bytes+mask")
    text = held_out_samples(examples, 0, own)
    numbers = np.arange(examples.size)
    rows = examples.rows(numbers, numbers * 0)
    assert text.samples == examples.size and text.tokens == rows.counts.sum()
    losses = np.random.default_rng(0).random((examples.size, 64))  # what a model would say of each target
    expected = losses[rows.counts].sum()
    for data_size, micro in ((1, 4), (2, 3), (4, 16)):
        parts = [list(held_out_batches(text, micro, rank, data_size)) for rank in range(data_size)]
        assert len({tuple(batch.ids.shape for batch, _ in part) for part in parts}) == 1
        total = 0.0
        for batches in zip(*parts, strict=True):
            sums = [(batch.weights * losses[np.minimum(batch.samples, examples.size - 1)]).sum() for batch, _ in batches]
            total += np.mean(sums) * batches[0][1]
        assert total == pytest.approx(expected, rel=1e-6)
        assert all((batch.sentences == rows.sentences[np.minimum(batch.samples, examples.size - 1)]).all() for batch, _ in parts[0])


def test_as_many_samples_as_the_tokens_need_and_their_bytes(examples) -> None:
    own = tokenizer.fixed("builtin:bytes+mask")
    text = held_out_samples(examples, 11, own)
    assert (text.samples, text.tokens) == (2, 2 * examples.drawn)
    rows = examples.rows(np.arange(2), np.zeros(2, int))
    read = [bytes(targets[counts][targets[counts] < 256].tolist()) for targets, counts in zip(rows.targets, rows.counts, strict=True)]
    assert text.num_bytes == sum(len(one.decode("utf-8", "replace").encode()) for one in read) > 10


def test_a_text_in_which_nothing_counts_is_a_mistake(examples, monkeypatch) -> None:
    monkeypatch.setattr(examples, "counted", lambda numbers, epochs: np.zeros(len(numbers), int))
    assert "no token counts" in sentence(lambda: held_out_samples(examples, 0, tokenizer.fixed("builtin:bytes+mask")))
