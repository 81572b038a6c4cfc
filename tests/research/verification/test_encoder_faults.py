"""`verify` on experiments of a BERT and a T5: what is right passes, and each of the errors that only an encoder can have is named."""

import functools

import pytest

from research import ROOT
from research.verification import layouts, ledger, numbers, training
from research.verification.layouts import LayoutCase
from research.verification.numbers import TOLERANCE, row_of
from research.verification.training import one_thread
from tests.harness import start_server
from tests.research.helpers import encoder_mutations as e
from tests.research.helpers import mutations as m
from tests.research.helpers.example import bert, t5

STEPS = 2
TP2, SP2 = LayoutCase(tensor=2, accumulated=2), LayoutCase(tensor=2, sequence=True, accumulated=2)
DP2, PP2 = LayoutCase(data=2, zero_stage=3, accumulated=2), LayoutCase(pipe=2, accumulated=2)
HEADS = {"sentence_head": True, "embedding_dropout": 0.1, "residual_dropout": 0.1, "attention_dropout": 0.1}
UNTIED = {"tied": False, "embedding_dropout": 0.1, "residual_dropout": 0.1, "attention_dropout": 0.1}


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    start_server()


@functools.cache
def subject_and_reference(kind: str, settings: tuple):
    """The example as `verify` shrinks it, with a clip that binds, and its serial reference run."""
    make = {"bert": bert, "t5": t5}[kind]
    with one_thread():
        experiment = training.binding_clip(layouts.shrunk(make(model=dict(settings)), 2, STEPS), STEPS, ROOT)
        return experiment, training.reference_run(experiment, STEPS, ROOT)


def verdict(kind: str, settings: dict, case: LayoutCase, train=training.on_rank):
    experiment, reference = subject_and_reference(kind, tuple(settings.items()))
    return row_of(case, experiment, STEPS, ROOT, reference, train)


@pytest.mark.parametrize(
    ("kind", "settings", "case"),
    [
        pytest.param("bert", {}, PP2, id="bert_pipe", marks=pytest.mark.slow),
        pytest.param("t5", {}, SP2, id="t5_sequence"),
        pytest.param("bert", HEADS, TP2, id="bert_heads_tensor", marks=pytest.mark.slow),
        pytest.param("bert", HEADS, SP2, id="bert_heads_sequence", marks=pytest.mark.slow),
        pytest.param("bert", HEADS, PP2, id="bert_heads_pipe", marks=pytest.mark.slow),
        pytest.param("bert", HEADS, DP2, id="bert_heads_zero_3", marks=pytest.mark.slow),
        pytest.param("t5", {}, PP2, id="t5_pipe", marks=pytest.mark.slow),
        pytest.param("t5", UNTIED, TP2, id="t5_untied_tensor", marks=pytest.mark.slow),
        pytest.param("t5", UNTIED, PP2, id="t5_untied_pipe", marks=pytest.mark.slow),
        pytest.param("t5", UNTIED, DP2, id="t5_untied_zero_3", marks=pytest.mark.slow),
    ],
)
def test_what_is_right_passes(kind: str, settings: dict, case: LayoutCase) -> None:
    row = verdict(kind, settings, case)
    assert row.verdict == "pass", row


WRONG = [  # the error, the kind, a layout that shows it, and what differs first
    (e.cross_attention_over_own_rows, "t5", DP2, "the output of decoder.blocks.0 in step 1"),
    (e.decoder_sees_later_rows, "t5", DP2, "the output of decoder.blocks.0 in step 1"),
    (e.causal_encoder, "t5", DP2, "the output of encoder.blocks.0 in step 1"),
    (e.relative_bias_of_the_first_heads, "t5", TP2, "the output of encoder.blocks.0 in step 1"),
    (e.table_counted_twice, "t5", PP2, "the gradient norm in step 1"),
    (m.tied_copies_not_summed, "t5", PP2, "the gradient of embedding.weight in step 1"),
    (e.parts_cut_together, "t5", SP2, "the output of embedding in step 1"),
    (e.causal_bert, "bert", DP2, "the output of blocks.0 in step 1"),
    (e.vocabulary_bias_of_the_first_rank, "bert", TP2, "in step 2"),
    (e.table_counted_twice, "bert", PP2, "the gradient norm in step 1"),
]
FAST_WRONG = ("cross_attention_over_own_rows",)


@pytest.mark.parametrize(
    ("mutation", "kind", "case", "first"),
    [
        pytest.param(*row, id=f"{row[0].__name__}-{row[1]}", marks=[] if row[0].__name__ in FAST_WRONG else pytest.mark.slow)
        for row in WRONG
    ],
)
def test_what_is_wrong_is_found_and_named(mutation, kind: str, case: LayoutCase, first: str) -> None:
    mutated = (m if mutation.__module__ == m.__name__ else e).mutated(mutation)
    row = verdict(kind, {}, case, mutated)
    assert row.verdict == "FAILED" and not row.why, row
    assert max(row.loss, row.norm, row.output, row.gradient, row.weight) > 10 * TOLERANCE
    assert first in row.first, row


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert_sotu", "translate_en_de"])
def test_a_shipped_experiment_is_the_same_and_communicates_as_computed(name: str, tmp_path, monkeypatch, capsys) -> None:
    """All pairwise layouts of two and four ranks. Grids of four ranks have stages that begin beside the border of the two stacks."""
    for module in (numbers, ledger):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    assert numbers.verify(ROOT / "experiments" / name, 4, False, 2) == 0
    assert ledger.ledger(ROOT / "experiments" / name, 4) == 0
    said = capsys.readouterr().out
    assert "27 of 27 layouts agree" in said and "27 of 27 layouts communicate" in said and "tensor axis not compared" not in said
