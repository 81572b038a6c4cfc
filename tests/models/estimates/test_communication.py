"""What a layer communicates, against the papers' formulas written out here. tests/research/verification/test_ledger.py counts calls."""

import pytest

from models.config import GPT
from models.estimates.communication import block_calls, has_closed_form, tensor_calls
from tests.research.helpers.example import MODEL


def model(**changes) -> GPT:
    return GPT(**MODEL | changes)


def sent(calls, degree: int, layer: str | None = None) -> float:
    """Elements that each rank sends on a ring: an all-reduce is a reduce-scatter and an all-gather."""
    return sum(
        call.times * call.elements * (2 if call.operation == "all_reduce" else 1) * (degree - 1) / degree
        for call in calls
        if layer in (None, call.layer)
    )


BIG = dict(num_layers=72, hidden_size=3072, num_heads=32, num_kv_heads=32, ffn_size=4 * 3072, vocab_size=51200, seq_length=1024)
"""Megatron-LM's 8.3B (arXiv:1909.08053, table 1)."""


@pytest.mark.parametrize(
    ("sequence", "recompute", "factor"),
    [(False, "none", 8), (True, "none", 8), (False, "full", 10), (True, "full", 8 + 3), (False, "selective", 8), (True, "selective", 8)],
)
def test_a_block_of_the_8_billion_model(sequence: bool, recompute: str, factor: int) -> None:
    """8·b·s·h·(t−1)/t elements. Recomputation repeats the forward pass's calls except the last reduction, which nothing reads."""
    b, s, h, t = 8, 1024, 3072, 8
    calls = [call for call in block_calls(model(**BIG), t, sequence, recompute, b) if call.elements > h]
    assert sent(calls, t) == factor * b * s * h * (t - 1) / t
    if (sequence, recompute) == (False, "none"):
        assert 2 * sent(calls, t) == 352_321_536  # bytes in fp16


def test_dropout_behind_the_last_reduction_has_it_run_again() -> None:
    calls = block_calls(model(**BIG, residual_dropout=0.1), 8, False, "full", 8)
    assert 2 * sent(calls, 8) == 528_482_304  # 12·b·s·h·(t−1)/t in fp16
    calls = block_calls(model(**BIG, residual="post_norm"), 8, False, "full", 8)
    assert 2 * sent(calls, 8) == 528_482_304


@pytest.mark.parametrize("tensor", [2, 4])
def test_the_cross_entropy_never_sends_the_vocabulary(tensor: int) -> None:
    calls = [call for call in tensor_calls(model(num_heads=4, num_kv_heads=4), tensor, False, "none", 3) if call.layer == "loss"]
    assert sum(call.times * call.elements for call in calls) == 4 * 3 * 128


def test_only_sequence_parallelism_sums_norms_and_biases() -> None:
    four = {"num_heads": 4, "num_kv_heads": 4}
    whole = block_calls(model(**four), 4, False, "none", 1)
    assert {call.formula for call in whole} == {"b·s·h"}
    (partial,) = [call for call in block_calls(model(**four), 4, True, "none", 1) if call.formula == "h"]
    assert (partial.times, partial.elements, partial.operation) == (6, 192, "all_reduce")  # 2 weights, 2 + 2 biases
    (partial,) = [call for call in block_calls(model(**four, norm="rmsnorm", bias=False), 4, True, "none", 1) if call.formula == "h"]
    assert partial.times == 2
    attention_bias = model(**four, norm="rmsnorm", bias=False, output_bias=True)
    (partial,) = [call for call in block_calls(attention_bias, 4, True, "none", 1) if call.formula == "h"]
    assert partial.times == 3


def test_shared_kv_heads_are_gathered_among_those_that_share() -> None:
    shared = [call for call in block_calls(model(num_heads=4, num_kv_heads=2), 4, False, "none", 3) if call.formula == "b·s·e"]
    assert {(call.direction, call.operation, call.times, call.ranks) for call in shared} == {
        ("forward", "all_gather", 2, 2),
        ("backward", "reduce_scatter", 2, 2),
    }
    assert {call.elements for call in shared} == {3 * 128 * 48}


def test_one_tensor_rank_is_silent_and_a_variant_unknown() -> None:
    assert tensor_calls(model(), 1, True, "full", 4) == []
    assert has_closed_form(model()) and not has_closed_form(model(norm="variant:Mine"))
