"""BERT's closed forms against published counts, torch's FLOP counter, built models, and the collectives of real ranks."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.encoder_config import BERT
from models.estimates.communication import has_closed_form, tensor_calls
from models.estimates.flops import forward_flops, training_flops
from models.estimates.parameters import parameters, parameters_on_rank
from parallel.grid import Grid
from parallel.layers import unique_parameters
from parallel.ledger import Entry, Ledger
from research.verification.ledger import beside, counted
from tests.harness import run_ranks
from tests.models.helpers.bert import EVERYWHERE, LENGTH, SAMPLES, inputs, labels, loss_of, shape, tensor_grid, whole_model

MODELS = {
    "post_norm": {},
    "pre_norm": {"residual": "pre_norm"},
    "no sentences": {"sentence_head": False, "mlp": "swiglu"},
    "dropping": EVERYWHERE | {"residual": "pre_norm"},
}


@pytest.mark.parametrize(
    ("depth", "hidden", "heads", "expected"), [(24, 1024, 16, 336_297_858), (24, 2048, 32, 1_280_739_202), (48, 2560, 40, 3_869_260_674)]
)
def test_the_models_of_the_megatron_paper(depth: int, hidden: int, heads: int, expected: int) -> None:
    """arXiv:1909.08053, table 4, with a vocabulary of 30,592: 336M, 1.3B and 3.9B. Both residuals have as many parameters."""
    for residual in ("post_norm", "pre_norm"):
        sizes = dict(num_layers=depth, hidden_size=hidden, num_heads=heads, ffn_size=4 * hidden, vocab_size=30_592, seq_length=512)
        assert parameters(shape(**sizes, residual=residual)) == expected


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_the_built_model_has_as_many(changes: dict) -> None:
    model = shape(**changes)
    assert parameters(model) == sum(parameter.numel() for _, parameter in unique_parameters(whole_model(model)))
    on_rank = whole_model(model, Grid(tensor=2))
    assert parameters_on_rank(model, 2) == sum(parameter.numel() for _, parameter in unique_parameters(on_rank))


@pytest.mark.parametrize("changes", [MODELS["post_norm"], MODELS["no sentences"]], ids=["post_norm", "no sentences"])
def test_equals_what_torch_counts(changes: dict) -> None:
    """Forward, and forward with backward. torch counts the sentence head as well, which has h² + 2h products per sample."""
    model = shape(**changes)
    module, (ids, segments, types) = whole_model(model), inputs()
    sentences = 2 * len(ids) * (model.hidden_size**2 + 2 * model.hidden_size) if model.sentence_head else 0
    with FlopCounterMode(display=False) as count, sdpa_kernel(SDPBackend.MATH):
        output = module((ids, segments, types))
    assert count.get_total_flops() == ids.numel() * (forward_flops(model) or 0) + sentences
    with count:
        loss_of(model)(output, labels(torch.float32, model.sentence_head)).backward()
    assert count.get_total_flops() == ids.numel() * ((training_flops(model) or 0) - (forward_flops(model) or 0)) + 2 * sentences


def entries(jobs: list[tuple[BERT, bool, str]]) -> list[list[Entry]]:
    """Every collective of one forward and backward pass of each model on all ranks of the tensor axis, loss included."""
    found: list[list[Entry]] = []
    for model, sequence, recompute in jobs:
        grid, seen = tensor_grid(sequence), []
        book = Ledger(grid, seen.append)
        module = whole_model(model, grid, recompute=recompute)
        module.watch(book.within)
        ids, *context = inputs()
        with book:
            output = module((ids, *([SAMPLES] if model.drops else []), *context))
            book.within("loss", loss_of(model, grid))(output, labels(torch.float32, model.sentence_head)).backward()
        found.append(seen)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [2, 4])
def test_what_real_ranks_communicate(tensor: int) -> None:
    """Every call by layer, direction, operation and size, with and without sequence parallelism and recomputation."""
    kinds = [(sequence, recompute) for sequence in (False, True) for recompute in ("none", "full")]
    jobs = [(shape(**changes), *kind) for changes in MODELS.values() for kind in kinds]
    for rank in run_ranks(entries, tensor, jobs):
        for (model, sequence, recompute), seen in zip(jobs, rank, strict=True):
            lines = beside(tensor_calls(model, tensor, sequence, recompute, 2), counted(entry for entry in seen))
            assert len(lines) >= 6
            assert not [line for line in lines if line.expected != line.found], (model, sequence, recompute)


def test_a_variant_has_no_closed_form() -> None:
    model = shape(residual="variant:Mine")
    assert has_closed_form(shape()) and not has_closed_form(model)
    assert parameters(model) is None and forward_flops(model) is None and parameters_on_rank(model, 2) is None


def test_the_length_of_the_text_counts_in_attention_alone() -> None:
    model = shape()
    assert (forward_flops(model, 2 * LENGTH) or 0) - (forward_flops(model) or 0) == 2 * 2 * 2 * 32 * LENGTH
