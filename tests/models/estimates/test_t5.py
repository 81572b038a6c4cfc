"""T5's closed forms against published counts, torch's FLOP counter, built models, and the collectives of real ranks."""

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.encoder_config import T5
from models.estimates.communication import has_closed_form, tensor_calls
from models.estimates.flops import forward_flops, t5_row_flops, training_flops
from models.estimates.parameters import parameters, parameters_on_rank
from models.gpt import TokenLoss
from parallel.grid import Grid
from parallel.layers import unique_parameters
from parallel.ledger import Entry, Ledger
from research.verification.ledger import beside, counted
from tests.harness import run_ranks
from tests.models.helpers.build import tensor_grid
from tests.models.helpers.t5 import DROPPING, batch, shape, whole_model

MODELS = {
    "tied": {},
    "untied, gated, wide heads": dict(tied=False, mlp="geglu_tanh", head_size=12, num_encoder_layers=1),
    "dropping": DROPPING,
}


def test_t5_small_and_umt5_small() -> None:
    """60,506,624 (arXiv:1910.10683, 60M) with one table a stack, so ours has five more of each; google/umt5-small has 306,601,984."""
    small = dict(hidden_size=512, num_heads=8, head_size=64, ffn_size=2048, num_encoder_layers=6, num_layers=6, vocab_size=32_128,
                 relative_buckets=32, relative_distance=128)  # fmt: skip
    assert parameters(shape(**small)) == 60_506_624 + 2 * 5 * 32 * 8
    umt5 = small | dict(num_heads=6, ffn_size=1024, num_encoder_layers=8, num_layers=8, vocab_size=256_384, mlp="geglu_tanh", tied=False)
    assert parameters(shape(**umt5)) == 306_601_984


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_the_built_model_has_as_many(changes: dict) -> None:
    model = shape(**changes)
    assert parameters(model) == sum(parameter.numel() for _, parameter in unique_parameters(whole_model(model)))
    on_rank = whole_model(model, Grid(tensor=2))
    assert parameters_on_rank(model, 2) == sum(parameter.numel() for _, parameter in unique_parameters(on_rank))


@pytest.mark.parametrize("changes", [MODELS["tied"], MODELS["untied, gated, wide heads"]], ids=["tied", "untied"])
def test_equals_what_torch_counts(changes: dict) -> None:
    """Of three rows, forward, and backward as twice that."""
    model = shape(**changes)
    module, pairs = whole_model(model), batch(model)
    with FlopCounterMode(display=False) as count, sdpa_kernel(SDPBackend.MATH):
        logits = module(pairs.inputs(model))
    row = t5_row_flops(model, model.seq_length)
    assert count.get_total_flops() == 3 * row
    with count:
        logits.sum().backward()
    assert count.get_total_flops() == 6 * row
    tokens = model.source_length + model.seq_length
    assert forward_flops(model) == round(row / tokens) and training_flops(model) == 3 * round(row / tokens)


def entries(jobs: list[tuple[T5, bool, str]]) -> list[list[Entry]]:
    """Every collective of one forward and backward pass of each model on all ranks of the tensor axis, loss included."""
    found: list[list[Entry]] = []
    for model, sequence, recompute in jobs:
        grid, seen = tensor_grid(sequence), []
        book = Ledger(grid, seen.append)
        module, pairs = whole_model(model, grid, recompute), batch(model)
        module.watch(book.within)
        with book:
            loss = book.within("loss", TokenLoss(model.vocab_size, 0.0, grid.tensor_group))
            loss(module(pairs.inputs(model)), (pairs.targets, pairs.weights)).backward()
        found.append(seen)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [2, 4])
def test_what_real_ranks_communicate(tensor: int) -> None:
    """Every call by layer, direction, operation and size, with and without sequence parallelism and recomputation."""
    kinds = [(sequence, recompute) for sequence in (False, True) for recompute in ("none", "full", "selective")]
    jobs = [(shape(**changes), *kind) for changes in MODELS.values() for kind in kinds]
    for rank in run_ranks(entries, tensor, jobs):
        for (model, sequence, recompute), seen in zip(jobs, rank, strict=True):
            lines = beside(tensor_calls(model, tensor, sequence, recompute, 3), counted(entry for entry in seen))
            assert len(lines) >= 10
            assert not [line for line in lines if line.expected != line.found], (model, sequence, recompute)


def test_a_variant_has_no_closed_form() -> None:
    model = shape(mlp="variant:Mine")
    assert has_closed_form(shape()) and not has_closed_form(model)
    assert parameters(model) is None and forward_flops(model) is None and parameters_on_rank(model, 2) is None


def test_a_longer_target_costs_more_in_attention_and_in_its_own_rows() -> None:
    """By hand for one block each: hidden 32, 4 heads of 8, MLP 48, 83 tokens, a source of 12."""
    model = shape(num_encoder_layers=1, num_layers=1)
    per_token = 4 * 32 * 32 + 2 * 32 * 48 + 2 * 32 * 32 + 2 * 12 * 32 + 83 * 32
    assert t5_row_flops(model, 9) - t5_row_flops(model, 8) == 2 * (per_token + 2 * (81 - 64) * 32)
