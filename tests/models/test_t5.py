"""T5 is transformers' UMT5, with padding, tied and untied, on one and two tensor ranks; packed pairs; dropout; planted faults."""

import functools
import math

import pytest
import torch

from models.encoder_config import T5
from models.relative_position import BidirectionalRelative, CausalRelative
from models.segments import visible
from models.t5 import layers
from models.t5_attention import visible_sources
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import stage_bounds
from tests.harness import run_ranks
from tests.models.helpers import t5
from tests.models.helpers.build import ALONE, relative, values, worst
from tests.models.helpers.t5 import DROPPING, PADDING, Batch, random_weights, shape, whole_model

MODELS = {
    "tied, relu": shape(),
    "untied, gated, wide heads": shape(tied=False, mlp="geglu_tanh", head_size=12, num_encoder_layers=3, num_layers=1, relative_buckets=10),
}


def errors(model: T5, found: tuple) -> dict[str, float]:
    """Relative errors of loss, logits (where the target is no padding) and of the worst gradient, against transformers."""
    (loss, logits, own), (true_loss, true_logits, true) = found, t5.theirs(model)
    real = t5.batch(model).segments[:, model.source_length :] != PADDING
    return {
        "loss": abs(float(loss) - true_loss) / true_loss,
        "logits": relative(logits[real], true_logits[real]),
        "gradients": worst(t5.their_names(model, own), true)[0],
    }


def in_fp32(model: T5) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in random_weights(model).items()}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_umt5_s(name):
    """fp32, 1e-5; among the batch is a target with padding whose padding sees no source, and a source with padding."""
    model = MODELS[name]
    found = errors(model, t5.run(model, in_fp32(model), ALONE, t5.batch(model)))
    assert max(found.values()) <= 1e-5, found


@functools.cache
def on_two_ranks() -> dict[tuple[str, bool], list]:
    """What two tensor ranks return for each model, whole and along the sequence."""
    keys = [(name, sequence) for name in MODELS for sequence in (False, True)]
    jobs = [dict(model=MODELS[name], dtype=torch.float32, sequence=sequence) for name, sequence in keys]
    return dict(zip(keys, zip(*run_ranks(t5.on_rank, 2, jobs), strict=True), strict=True))


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("name", MODELS)
def test_two_tensor_ranks_are_umt5_too(name, sequence):
    model = MODELS[name]
    found = errors(model, t5.joined(model, on_two_ranks()[name, sequence]))
    assert max(found.values()) <= 1e-5, found


# What the comparison must notice.


def cross_attention_over_own_rows(module):
    for block in decoder_blocks(module):
        forward = block.cross_attention.forward
        block.cross_attention.forward = lambda x, source, bias, samples, forward=forward: forward(x, x, bias[..., :1] * 0, samples)


def decoder_mask_off(module):
    for block in decoder_blocks(module):
        block.attention.position.hidden = lambda distance: torch.zeros_like(distance, dtype=torch.bool)
        attention = block.attention
        attention.forward = lambda x, samples, segments, attention=attention: both_ways(attention, x)


def both_ways(attention, x):
    q, k, v = attention.heads(x)
    y = attention.core(q, k, v, attention.position.bias(q), None)
    return attention.output(y.transpose(1, 2).flatten(2))


def causal_encoder(module):
    for part in module.modules():
        if isinstance(part, BidirectionalRelative):
            part.hidden = lambda distance: distance > 0


def buckets_of_the_other_stack(module):
    for block in decoder_blocks(module):
        position = block.attention.position
        position.buckets = functools.partial(BidirectionalRelative.buckets, position)


def no_encoder_padding(module):
    for part in module.modules():
        if type(part).__name__ == "EncoderBlock":
            encode = part.encode
            part.encode = lambda x, samples, segments, encode=encode: encode(x, samples, segments * 0)


def scores_divided(module):
    for part in module.modules():
        if hasattr(part, "divisor"):
            part.divisor = lambda q: math.sqrt(q.shape[-1])


def head_not_scaled(module):
    layer, head = module.steps[-1]
    module.steps[-1] = (layer, lambda x: head(x * math.sqrt(x.shape[-1])))


def decoder_blocks(module):
    return [part for part in module.modules() if type(part).__name__ == "DecoderBlock"]


FAULTS = [
    *(cross_attention_over_own_rows, decoder_mask_off, causal_encoder, buckets_of_the_other_stack, no_encoder_padding, scores_divided),
    head_not_scaled,
]


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_noticed(spoil):
    model = MODELS["tied, relu"]
    found = errors(model, t5.run(model, in_fp32(model), ALONE, t5.batch(model), spoil=spoil))
    assert found["logits"] > 1e-3 and found["gradients"] > 1e-3, found


def bias_not_cut(module):
    """Every rank adds the bias of the first heads, as a table that is held whole would give."""
    for part in module.modules():
        if isinstance(part, CausalRelative):
            torch.distributed.broadcast(part.weight.data, 0)


def test_a_relative_bias_that_is_not_cut_is_noticed():
    model = MODELS["tied, relu"]
    jobs = [dict(model=model, dtype=torch.float32, sequence=False, spoil=bias_not_cut)]
    found = errors(model, t5.joined(model, [rank[0] for rank in run_ranks(t5.on_rank, 2, jobs)]))
    assert found["logits"] > 1e-3, found


# Packed pairs.


def pairs_of(lengths: list[tuple[int, int]], model: T5) -> list[tuple[torch.Tensor, ...]]:
    """(source, target, next tokens, weights) of random pairs of these lengths."""
    g = torch.Generator().manual_seed(9)
    draw = lambda n: torch.randint(1, model.vocab_size, (n,), generator=g)  # noqa: E731
    return [(draw(s), draw(t), draw(t), torch.rand(t, generator=g, dtype=torch.float64)) for s, t in lengths]


def packed(rows: list[list[tuple[torch.Tensor, ...]]], model: T5) -> Batch:
    """Rows of several pairs each, numbered from 0, with padding behind them."""
    s, t, n = model.source_length, model.seq_length, len(rows)
    ids, segments = torch.zeros(n, s + t, dtype=torch.int64), torch.full((n, s + t), PADDING)
    targets, weights = torch.zeros(n, t, dtype=torch.int64), torch.zeros(n, t, dtype=torch.float64)
    for row, pairs in enumerate(rows):
        at, then = 0, 0
        for number, (source, target, following, weight) in enumerate(pairs):
            for first, part in ((at, source), (s + then, target)):
                ids[row, first : first + len(part)], segments[row, first : first + len(part)] = part, number
            targets[row, then : then + len(target)], weights[row, then : then + len(target)] = following, weight
            at, then = at + len(source), then + len(target)
    return Batch(ids, segments, targets, weights, torch.arange(n))


def test_packed_pairs_are_single_pairs():
    """Loss, logits and every gradient in fp64, 1e-12: three pairs in a row that has room for one more token, and one alone."""
    model = shape(source_length=16, seq_length=12)
    pairs = pairs_of([(5, 3), (4, 6), (6, 2), (3, 4)], model)
    weights = random_weights(model)
    loss, logits, found = t5.run(model, weights, ALONE, packed([pairs[:3], pairs[3:]], model))
    true_loss, true, true_gradients = t5.run(model, weights, ALONE, packed([[pair] for pair in pairs], model))
    assert abs(float(loss - true_loss)) <= 1e-12 * abs(float(true_loss))
    assert worst(found, true_gradients)[0] <= 1e-12
    alone = torch.cat([true[0, :3], true[1, :6], true[2, :2]])
    assert relative(logits[0, :11], alone) <= 1e-12 and relative(logits[1, :4], true[3, :4]) <= 1e-12


def test_a_pair_sees_no_other_pair():
    """Another first source changes the logits of the first target alone."""
    model = shape(source_length=16, seq_length=12)
    pairs = pairs_of([(5, 3), (4, 6)], model)
    module = whole_model(model)
    before = packed([pairs], model)
    after = before._replace(ids=before.ids.clone())
    after.ids[0, 2] += 1
    changed = (module(before.inputs(model)) != module(after.inputs(model)))[0].any(-1)
    assert changed.tolist() == [True] * 3 + [False] * 9


# Dropout and recomputation.


def test_dropout_is_the_same_on_every_layout_and_recomputed():
    """Loss and every gradient in fp64, 1e-12, on one rank and on two, whole and along the sequence, with either recomputation."""
    model = shape(**DROPPING)
    loss, logits, true = t5.run(model, random_weights(model), ALONE, t5.batch(model))
    plain, *_ = t5.run(shape(), random_weights(shape()), ALONE, t5.batch(model))
    assert abs(float(loss - plain)) > 1e-3
    layouts = [(False, "none"), (True, "none"), (False, "full"), (True, "selective")]
    jobs = [dict(model=model, dtype=torch.float64, sequence=sequence, recompute=recompute) for sequence, recompute in layouts]
    for ranks in zip(*run_ranks(t5.on_rank, 2, jobs), strict=True):
        found_loss, found_logits, found = t5.joined(model, list(ranks))
        assert abs(found_loss - float(loss)) <= 1e-12 * abs(float(loss))
        assert relative(found_logits, logits[..., : model.vocab_size]) <= 1e-12
        assert worst(found, true)[0] <= 1e-12


@pytest.mark.parametrize("only", [*DROPPING, "all"])
def test_every_dropout_drops_in_training_alone(only):
    """Each of the four changes the logits in training; none does in evaluation."""
    model = shape(**(DROPPING if only == "all" else {only: 0.1}))
    module = whole_model(model)
    pairs = t5.batch(model)
    training, evaluation = module(pairs.inputs(model)), module.eval()(pairs.inputs(model))
    plain = whole_model(shape())(pairs.inputs(shape()))
    assert torch.equal(evaluation, plain) and relative(training, plain) > 1e-3


def test_the_mask_of_cross_attention_has_a_column_for_each_source_row():
    """The same hash as in self-attention: (query position, global head, key position)."""
    core = whole_model(shape(attention_dropout=0.3)).get_submodule("decoder.blocks.0").cross_attention.core
    samples, (t, s) = torch.tensor([3, 8]), (5, 9)
    mask = core.mask(samples, torch.empty(2, 4, t, 8), torch.empty(2, 4, s, 8))
    square = core.mask(samples, torch.empty(2, 4, s, 8), torch.empty(2, 4, s, 8))
    assert mask.shape == (2, 4, t, s) and torch.equal(mask, square[:, :, :t])


# The list of layers.


def test_names_and_stages():
    """Both stacks are distributed over the stages; the encoder's norm lies behind its last block, on that block's stage."""
    model = shape(num_encoder_layers=1, num_layers=3)
    built = layers(model, ALONE, 0, context=("segments",))
    names = [layer.name for layer in built]
    assert names == [
        *("embedding", "encoder.blocks.0", "encoder.final_norm"),
        *(f"decoder.blocks.{i}" for i in range(3)),
        *("decoder.final_norm", "head"),
    ]
    assert stage_bounds(built, 4) == [0, 3, 4, 5, 8] and stage_bounds(built, 2) == [0, 4, 8]
    assert {layer.context for layer in layers(shape(**DROPPING), ALONE, 0, context=("segments",))} == {("samples", "segments")}


def test_every_parameter_knows_its_logical_name():
    for model in MODELS.values():
        module = whole_model(model)
        assert [name for name, _ in module.named_parameters()] == list(values(module))
        assert ("head.weight" in values(module)) != model.tied


def test_lengths_that_the_ranks_do_not_divide_are_refused():
    with pytest.raises(Mistake, match=r"parallel.tensor = 4 does not divide model.seq_length = 10 → use a multiple of 4"):
        layers(shape(seq_length=10), Grid(tensor=4, sequence=True), 0, context=("segments",))
    layers(shape(seq_length=10), Grid(tensor=4), 0, context=("segments",))
    with pytest.raises(ValueError, match="a T5 reads segments"):
        layers(shape(), ALONE, 0)


def test_initial_standard_deviations_are_umt5_s():
    """Within 15 %: of an untied head alone, which theirs draws with 1, ours is 1/√d, as in the code of T5 1.1."""
    model = shape(hidden_size=64, head_size=16, ffn_size=256, vocab_size=300, relative_buckets=64, relative_distance=128)
    fresh = values(whole_model(model))
    from transformers import UMT5Config, UMT5ForConditionalGeneration

    drawn = UMT5ForConditionalGeneration(UMT5Config(**t5.their_settings(model))).state_dict()
    for name, tensor in t5.their_names(model, fresh).items():
        if tensor.dim() == 2:
            assert float(tensor.std()) == pytest.approx(float(drawn[name].std()), rel=0.15), name
        else:
            assert torch.equal(tensor, drawn[name])


def test_padding_of_a_target_sees_every_source_a_little():
    """A row without a visible key has finite scores, in every precision, with any score added."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        bias = visible_sources(torch.tensor([[PADDING]]), torch.tensor([[0, 0, 1]]), dtype)
        assert (bias - 30_000).isfinite().all() and (bias - 30_000).softmax(-1).isfinite().all()
    assert visible(torch.tensor([[0]]), torch.tensor([[0, 1]]), torch.float32).tolist() == [[[[0.0, -math.inf]]]]
