"""BERT against transformers' models with the same random weights, on one and two tensor ranks; dropout, recomputation, padding.

Real engines: tests/parallel/engines/test_bert.py.
"""

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import bert
from models.block import PreNormBlock
from models.config import ATTENTIONS
from models.encoder_config import BERT
from models.segments import SEGMENTS
from parallel.errors import Mistake
from parallel.grid import Grid
from tests.harness import run_ranks
from tests.models.helpers.bert import (
    CONTEXT,
    EVERYWHERE,
    LENGTH,
    SAMPLES,
    VOCAB,
    inputs,
    labels,
    loss_of,
    random_weights,
    run,
    run_all,
    shape,
    whole_model,
)
from tests.models.helpers.build import ALONE, as_arrays, fill, gradients, joined_as, relative, values, worst
from tests.models.helpers.their_bert import CLASSES, by_our_names, their_model

LAYOUTS = [(1, False), (2, False), (2, True)]
"""(tensor ranks, sequence parallelism)"""
OUTPUTS = ("logits", "sentence_logits", "loss")


@functools.cache
def truth(residual: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(random weights by our names, transformers' logits, loss and gradients with them)."""
    model = their_model(residual, dtype)
    ids, segments, types = inputs()
    found = model(ids, attention_mask=(segments >= 0).long(), token_type_ids=types)
    targets, weights, sentences, sentence_weights = labels(dtype)
    of_tokens = F.cross_entropy(found.prediction_logits.flatten(0, 1), targets.flatten(), reduction="none")
    of_sentences = F.cross_entropy(found.seq_relationship_logits, sentences, reduction="none")
    loss = (weights.flatten() * of_tokens).sum() + (sentence_weights * of_sentences).sum()
    loss.backward()
    ours = functools.partial(by_our_names, residual)
    outputs = {"logits": found.prediction_logits, "sentence_logits": found.seq_relationship_logits, "loss": loss}
    gradient = ours({name: parameter.grad for name, parameter in model.named_parameters()})
    return ours({name: p.detach() for name, p in model.named_parameters()}), {n: t.detach() for n, t in (outputs | gradient).items()}


@functools.cache
def found_on(tensor: int, sequence: bool) -> dict[tuple[str, torch.dtype], list[dict]]:
    """What each rank of this layout finds, for both residuals in both precisions, in one launch."""
    keys = [(residual, dtype) for residual in CLASSES for dtype in (torch.float32, torch.float64)]
    jobs = [(shape(residual=residual), as_arrays(truth(residual, dtype)[0]), "none") for residual, dtype in keys]
    ranks = run_ranks(run_all, tensor, jobs, sequence)
    return {key: [rank[i] for rank in ranks] for i, key in enumerate(keys)}


def joined(model: BERT, ranks: list[dict]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(whole outputs, whole gradients). What is not sliced must be equal on every rank."""
    outputs = {"logits": torch.cat([torch.from_numpy(rank["logits"]) for rank in ranks], -1)[..., : model.vocab_size]}
    for name in OUTPUTS[1:]:
        outputs[name] = torch.as_tensor(ranks[0][name])
        assert all((rank[name] == ranks[0][name]).all() for rank in ranks), f"{name} differs between tensor ranks"
    return outputs, joined_as(whole_model(model), ranks)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("residual", CLASSES)
def test_logits_and_gradients_are_those_of_transformers(residual, layout, dtype, tolerance):
    """With token types and padding; logits of padding are not compared."""
    model, (_, true) = shape(residual=residual), truth(residual, dtype)
    outputs, found = joined(model, found_on(*layout)[residual, dtype])
    real = inputs()[1] >= 0
    assert true["logits"][real].abs().max() > 0.5  # else there is nothing to compare
    for name in OUTPUTS:
        ours, theirs = (one[name][real] if name == "logits" else one[name] for one in (outputs, true))
        assert relative(ours, theirs) <= tolerance, name
    error, name = worst(found, {name: tensor for name, tensor in true.items() if name not in OUTPUTS})
    assert error <= tolerance, name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_dropout_is_the_same_on_every_layout_and_in_every_recomputation(layout):
    """Loss and every gradient in fp64, with and without a sentence head; on one rank recomputation changes no bit."""
    models = [shape(residual=residual, sentence_head=residual == "post_norm", **EVERYWHERE) for residual in CLASSES]
    jobs = [(model, as_arrays(random_weights(model)), how) for model in models for how in ("none", "selective", "full")]
    ranks = run_ranks(run_all, layout[0], jobs, layout[1])
    for i, (model, _, _) in enumerate(jobs):
        true = run(model, random_weights(model))
        assert all(abs(rank[i]["loss"] - true["loss"]) <= 1e-12 * abs(true["loss"]) for rank in ranks)
        expected = {name: torch.from_numpy(true[name]) for name in random_weights(model)}
        found = joined_as(whole_model(model), [rank[i] for rank in ranks])
        error, name = worst(found, expected)
        assert error <= (1e-11 if layout[0] > 1 else 0), name


def test_dropout_drops():
    model = shape(**EVERYWHERE)
    assert abs(run(model, random_weights(model))["loss"] - run(shape(), random_weights(model))["loss"]) > 0.01


def test_padded_rows_of_the_vocabulary_get_no_gradient():
    """83 rows on two ranks: rank 1 has one row of padding, in the table and in the bias."""
    model = shape()
    ranks = run_ranks(run_all, 2, [(model, as_arrays(random_weights(model)), "none")], False)
    for name in ("embedding.weight", "head_bias.bias"):
        gradient = torch.from_numpy(ranks[1][0][name])
        assert len(gradient) == 42 and gradient[:41].count_nonzero(-1).all() and not gradient[41:].any(), name


def names(model: BERT, grid: Grid = ALONE) -> list[str]:
    return [layer.name for layer in bert.layers(model, grid, seed=0)]


def test_names_of_the_layers():
    blocks, head = ["blocks.0", "blocks.1"], ["masked_lm", "head", "head_bias"]
    start = ["embedding", "token_types", "position"]
    assert names(shape()) == [*start, "embedding_norm", *blocks, "sentence", *head, "outputs"]
    assert names(shape(residual="pre_norm", sentence_head=False)) == [*start, *blocks, "final_norm", *head]
    assert "embedding_dropout" in names(shape(embedding_dropout=0.1))


def test_every_parameter_knows_its_logical_name():
    """It is equal to torch's name of the parameter in the module."""
    module = whole_model(shape())
    assert list(values(module)) == [name for name, _ in module.named_parameters()]
    assert module.head.weight is module.embedding.weight


def logits_of(module, ids: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
    return module((ids, *context) if context else ids)


@pytest.mark.parametrize("residual", CLASSES)
def test_packed_equals_one_at_a_time(residual):
    """Two texts in one row, with numbers in any order, give the logits that each gives alone; fp64."""
    model = shape(residual=residual)
    ids, _, types = inputs()
    segments = torch.where(torch.arange(LENGTH) < 6, 9, 2).expand(2, -1)
    module = whole_model(model).double()
    fill(module, random_weights(model))
    found, _ = logits_of(module, ids, segments, types)
    for part in (slice(0, 6), slice(6, LENGTH)):
        alone, _ = logits_of(module, ids[:, part], torch.zeros_like(ids[:, part]), types[:, part])
        assert relative(found[:, part], alone) < 1e-13


def test_padding_and_other_texts_change_nothing():
    """Other ids in the padding: every logit of the text and every gradient is the same bit for bit."""
    model, results = shape(), []
    ids, segments, types = inputs()
    for tokens in (ids, torch.where(segments < 0, 17, ids)):
        module = whole_model(model).double()
        fill(module, random_weights(model))
        output = logits_of(module, tokens, segments, types)
        loss_of(model)(output, labels(torch.float64)).backward()
        results.append((output[0][segments >= 0].detach(), gradients(module)))
    (first, one), (second, two) = results
    assert torch.equal(first, second) and all(torch.equal(one[name], two[name]) for name in one)


def test_the_future_is_seen():
    """Without segments every place sees every other one: the last token changes the first one's logits."""
    module = whole_model(shape(), context=()).double()
    fill(module, random_weights(shape()))
    ids = inputs()[0][:1]
    before, after = (logits_of(module, torch.cat([ids[:, :-1], torch.tensor([[last]])], 1))[0][0, 0] for last in (5, 6))
    assert not torch.allclose(before, after)


def test_without_token_types_every_token_has_the_first():
    model, (ids, segments, types) = shape(), inputs()
    without, given = whole_model(model, context=(SEGMENTS,)), whole_model(model)
    for module in (without, given):
        fill(module, random_weights(model))
    ours, theirs = logits_of(without, ids, segments), logits_of(given, ids, segments, torch.zeros_like(types))
    assert torch.equal(ours[0], theirs[0]) and not torch.equal(ours[0], logits_of(given, ids, segments, types)[0])


def test_the_loss_is_a_weighted_sum_of_both():
    """Equal to torch's own losses in fp64; without a sentence head it is the token loss."""
    g = torch.Generator().manual_seed(0)
    logits, of_sentences = (torch.randn(size, generator=g, dtype=torch.float64) for size in ((2, LENGTH, VOCAB), (2, 2)))
    targets, weights, sentences, sentence_weights = labels(torch.float64)
    tokens = (weights.flatten() * F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")).sum()
    both = tokens + (sentence_weights * F.cross_entropy(of_sentences, sentences, reduction="none")).sum()
    assert float(loss_of(shape())((logits, of_sentences), labels(torch.float64)) - both) == pytest.approx(0, abs=1e-12)
    assert float(loss_of(shape(sentence_head=False))(logits, labels(torch.float64)[:2]) - tokens) == pytest.approx(0, abs=1e-12)


def test_a_gpt_cannot_choose_attention_in_both_directions():
    assert "bidirectional" not in ATTENTIONS and shape().attention == "bidirectional"


class OwnBlock(PreNormBlock):
    """A block of a variant.py: its attention is the model's."""


class OldBlock(PreNormBlock):
    def forward(self, x: Tensor, samples: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, samples)


def test_a_block_of_a_variant():
    """It attends in both directions as well. One that would lose the segments is refused."""
    model, variants = shape(residual="variant:OwnBlock"), {"OwnBlock": OwnBlock, "OldBlock": OldBlock}
    own, given = whole_model(model, variants=variants), whole_model(shape(residual="pre_norm"))
    assert torch.equal(logits_of(own, *inputs())[0], logits_of(given, *inputs())[0])
    with pytest.raises(Mistake, match="model.residual = 'variant:OldBlock': its forward takes no segments"):
        whole_model(shape(residual="variant:OldBlock"), variants=variants)


def test_samples_come_first_in_the_context():
    module = whole_model(shape(**EVERYWHERE))
    assert module.context == ("samples", *CONTEXT)
    assert logits_of(module.eval(), inputs()[0], SAMPLES, *inputs()[1:])[1].shape == (2, 2)
