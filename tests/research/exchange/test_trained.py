"""Runs of the encoders, exported in the middle of their training: transformers computes the validation loss that the run has logged.

And out and in again, what was trained here is the same to the bit.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForPreTraining, AutoModelForSeq2SeqLM, AutoTokenizer

from parallel.checkpoint.folder import latest
from parallel.checkpoint.reader import Reader
from research import ROOT
from research.cli import export
from research.config import Pairs, serialization
from research.data import prepare
from research.training.sampler import held_out_of
from tests.research.helpers.hf_models import imported
from tests.research.helpers.small_runs import Ended, Stage

STEPS, MIDDLE = 4, 2
CLOSE = 1e-5
"""Relative: the order of additions in fp32."""


def trained(place: Path, name: str, world: int = 1, **changes) -> Ended:
    """A small run with a validation and a checkpoint in the middle and at the end, between which it has learned something."""
    stage = Stage(place, name)
    for file in place.glob("validation.*"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:60]))
    ended = stage.run(
        "run", world, schedule={"steps": STEPS, "validate_every": MIDDLE}, checkpoints={"every": MIDDLE, "keep_last": 2}, **changes
    )
    assert set(ended.codes) == {0}, ended.said
    assert ended.rows("val/loss")[STEPS] != pytest.approx(ended.rows("val/loss")[MIDDLE], rel=1e-3)
    return ended


def exported(ended: Ended, step: int, folder: Path) -> Path:
    export.main([str(ended.folder.checkpoints / f"step_{step:06d}"), str(folder)])
    return folder


@torch.no_grad()
def loss_of_pairs(folder: Path, pairs: Path) -> float:
    """The mean of the nats of the targets' tokens and ends, with one pair in a row, as a user of transformers computes it from the text."""
    model, words = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.config.tie_word_embeddings = False  # transformers 5 takes every UMT5 for tied
    words.pad_token = words.eos_token
    found = [json.loads(line) for line in pairs.read_text().splitlines()]
    sources = words([pair["source"] + "<sep>" for pair in found], padding=True, return_tensors="pt")
    targets = words([pair["target"] + words.eos_token for pair in found], padding=True, return_tensors="pt")
    labels = targets.input_ids.masked_fill(targets.attention_mask == 0, -100)
    return float(model(input_ids=sources.input_ids, attention_mask=sources.attention_mask, labels=labels).loss)


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_t5_of_pairs_has_the_loss_of_its_training(tensor: int, tmp_path) -> None:
    """The import of an export knows that it was trained on pairs, and holds the same weights."""
    parallel = {"tensor": tensor, "sequence": tensor > 1}
    ended = trained(tmp_path, "translate_en_de", tensor, model={"residual_dropout": 0.0}, parallel=parallel)
    middle, pairs = exported(ended, MIDDLE, tmp_path / "middle"), tmp_path / "validation.jsonl"
    assert loss_of_pairs(middle, pairs) == pytest.approx(ended.rows("val/loss")[MIDDLE], rel=CLOSE)

    back = imported(middle, tmp_path, "back")
    first, second = serialization.load(ended.folder.config), serialization.load(back.config)
    assert second.data.examples == Pairs() and second.model.tied == first.model.tied
    with Reader(ended.folder.checkpoints / f"step_{MIDDLE:06d}") as before, Reader(latest(back.checkpoints)) as after:
        assert set(before) == set(after) and all(torch.equal(before.read(name), after.read(name)) for name in before)


@torch.no_grad()
def loss_of_masked(folder: Path, ended: Ended) -> float:
    """The mean of the nats of the masked tokens of the run's held-out samples."""
    experiment, model = serialization.load(ended.folder.config), AutoModelForPreTraining.from_pretrained(folder)
    corpus = prepare.load(experiment.data, ROOT, experiment.model.vocab_size)
    (text,) = held_out_of(experiment, corpus, {})
    rows = text.examples.rows(np.arange(text.samples), np.zeros(text.samples, np.int64))
    ids, targets, counts, types = map(torch.from_numpy, (rows.ids, rows.targets, rows.counts, rows.token_types))
    return float(F.cross_entropy(model(input_ids=ids, token_type_ids=types).prediction_logits[counts], targets[counts]))


def test_a_bert_has_the_loss_of_its_training(tmp_path) -> None:
    """That of the masked tokens: a validation does not ask for the order of sentences."""
    ended = trained(tmp_path, "bert_sotu")
    middle = exported(ended, MIDDLE, tmp_path / "middle")
    assert loss_of_masked(middle, ended) == pytest.approx(ended.rows("val/loss")[MIDDLE], rel=CLOSE)
