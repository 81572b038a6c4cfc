"""The vocabulary sliced over ranks, against torch's embedding and cross entropy in one process: values, gradients, bytes sent."""

import functools
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from parallel.cross_entropy import BY_DEVICE, vocab_parallel_cross_entropy
from parallel.grid import Grid, make_grid
from parallel.slices import Slice, gathered, slice_of
from parallel.vocab import TiedHead, VocabParallelEmbedding, VocabParallelHead
from tests.harness import run_ranks

B, S, D = 3, 4, 6
DEGREES = [1, 2, 4]
VOCABULARIES = [8, 83, 5]  # divided by 4; by nothing; so small that rank 3 of 4 holds nothing but padding
SMOOTHINGS = [0.0, 0.1]
TOLERANCE = 1e-12


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    g = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shape, generator=g, dtype=torch.float64)


def ids_of(vocab_size: int) -> Tensor:
    """All over the vocabulary, its first and last row included."""
    return torch.arange(B * S).view(B, S) * 7 % vocab_size if vocab_size > 12 else (torch.arange(B * S) % vocab_size).view(B, S).flip(0)


class Case(NamedTuple):
    """Logits 'B S V' times `scale` plus `offset`, cast to `dtype`; `at_once` of a rank's are processed at a time."""

    vocab_size: int
    smoothing: float
    dtype: str = "float64"
    scale: float = 3.0
    offset: float = 0.0
    at_once: int = BY_DEVICE

    def logits(self) -> Tensor:
        return (drawn("logits", (B, S, self.vocab_size)) * self.scale + self.offset).to(getattr(torch, self.dtype))

    def weights(self) -> Tensor:
        return drawn("weights", (B, S)).to(self.loss_dtype)

    @property
    def loss_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32


class Found(NamedTuple):
    """What a rank saw. `gradient` is joined and unpadded; `padding` is the largest gradient of a padded column, NaN never."""

    loss: Tensor
    gradient: Tensor
    padding: float
    unchanged: bool
    sent: list[int]
    finite: bool


def sliced(case: Case, wild_padding: bool) -> Found:
    """The cross entropy on this rank's columns; padded columns hold a huge logit where `wild_padding`, as a trained bias might."""
    grid = make_grid(1, dist.get_world_size())
    cut = Slice((B, S, case.vocab_size), 2, (case.vocab_size,))
    local = cut.cut(case.logits(), grid.tensor_rank, grid.tensor)
    real = sum(region.length for region in cut.regions(grid.tensor_rank, grid.tensor))
    if wild_padding:
        local[..., real:] = 1e4
    before, leaf = local.clone(), local.requires_grad_()
    sent, counted = _counted()
    try:
        settings = (grid.tensor_group, case.vocab_size, case.smoothing, case.at_once)
        loss = vocab_parallel_cross_entropy(leaf, ids_of(case.vocab_size), *settings)
        (case.weights() * loss).sum().backward()
    finally:
        dist.all_reduce = counted
    padding = leaf.grad[..., real:].abs().max().item() if real < local.shape[-1] else 0.0
    whole = gathered(leaf.grad, cut, grid.tensor_group)
    same = torch.equal(leaf.detach().contiguous().view(torch.uint8), before.contiguous().view(torch.uint8))
    return Found(loss.detach(), whole, padding, same, sent, bool(torch.isfinite(leaf.grad).all()))


def _counted():
    """dist.all_reduce notes the bytes of each tensor it is given; every other collective is refused."""
    sent, inner = [], dist.all_reduce

    def counting(tensor, *arguments, **options):
        sent.append(tensor.numel() * tensor.element_size())
        return inner(tensor, *arguments, **options)

    dist.all_reduce = counting
    return sent, inner


def in_one_process(case: Case) -> tuple[Tensor, Tensor]:
    """torch's own, on the same numbers in fp64: loss and gradient."""
    leaf = case.logits().double().requires_grad_()
    flat = F.cross_entropy(leaf.flatten(0, 1), ids_of(case.vocab_size).flatten(), reduction="none", label_smoothing=case.smoothing)
    loss = flat.view(B, S)
    (case.weights().double() * loss).sum().backward()
    return loss.detach(), leaf.grad


EXACT = [Case(vocab_size, smoothing) for vocab_size in VOCABULARIES for smoothing in SMOOTHINGS]
EXACT += [Case(83, smoothing, at_once=220) for smoothing in SMOOTHINGS]  # blocks of 2, 5 and 10 of the 12 rows on 1, 2 and 4 ranks
LOW = [Case(83, smoothing, "bfloat16", scale, offset) for smoothing in SMOOTHINGS for scale, offset in [(3, 0), (30, 0), (0.5, 200.0)]]
EXTREME = [Case(83, smoothing, "float32", scale, offset) for smoothing in SMOOTHINGS for scale, offset in [(3e4, 0), (1, 3e4), (1, -3e4)]]


def all_cases(wild_padding: bool) -> dict[Case, Found]:
    return {case: sliced(case, wild_padding) for case in EXACT + LOW + EXTREME}


@functools.cache
def on_ranks(degree: int, wild_padding: bool = False) -> list[dict[Case, Found]]:
    return run_ranks(all_cases, degree, wild_padding)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_cross_entropy_is_torchs_in_fp64(case: Case, degree: int) -> None:
    loss, gradient = in_one_process(case)
    for found in on_ranks(degree):
        torch.testing.assert_close(found[case].loss, loss, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(found[case].gradient, gradient, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("case", LOW, ids=str)
def test_the_loss_of_bf16_logits_is_computed_in_fp32(case: Case, degree: int) -> None:
    """The same rounded logits in fp64 are the truth: the loss is fp32-exact, the gradient rounded once to bf16."""
    loss, gradient = in_one_process(case)
    for found in on_ranks(degree):
        assert found[case].loss.dtype == torch.float32 and found[case].gradient.dtype == torch.bfloat16
        torch.testing.assert_close(found[case].loss.double(), loss, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(found[case].gradient.double(), gradient, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("case", EXTREME, ids=str)
def test_extreme_logits_neither_overflow_nor_lose_digits(case: Case, degree: int) -> None:
    """A common offset of 3e4 leaves fp32 logits 3 digits behind the point, which the loss must not round again."""
    loss, gradient = in_one_process(case)
    for found in on_ranks(degree):
        assert found[case].finite
        torch.testing.assert_close(found[case].loss.double(), loss, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(found[case].gradient.double(), gradient, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("degree", DEGREES)
def test_logits_are_left_as_they_are_bit_for_bit(degree: int) -> None:
    assert all(found.unchanged for ranks in (on_ranks(degree), on_ranks(degree, True)) for cases in ranks for found in cases.values())


@pytest.mark.parametrize("degree", [2, 4])
def test_padding_gets_no_probability_and_no_gradient_whatever_stands_in_it(degree: int) -> None:
    for rank, (quiet, wild) in enumerate(zip(on_ranks(degree), on_ranks(degree, True), strict=True)):
        for case in quiet:
            assert quiet[case].padding == wild[case].padding == 0.0, (rank, case)
            assert torch.equal(quiet[case].loss, wild[case].loss) and torch.equal(quiet[case].gradient, wild[case].gradient)


@pytest.mark.parametrize("degree", [2, 4])
def test_it_sends_a_few_numbers_a_token_whatever_the_vocabulary(degree: int) -> None:
    for cases in on_ranks(degree):
        for case, found in cases.items():
            number = 8 if case.dtype == "float64" else 4
            assert found.sent == [B * S * number, 3 * B * S * number], "the maximum, then three sums; nothing backward"


def tables(vocab_size: int) -> dict[str, Tensor]:
    """Embedding, tied head and a head of its own on one rank: outputs, and their joined gradients."""
    grid = make_grid(1, dist.get_world_size())
    embedding = VocabParallelEmbedding("embedding", vocab_size, D, drawn, grid)
    heads = {"tied": TiedHead(embedding), "own": VocabParallelHead("own", vocab_size, D, drawn, grid)}
    x = embedding(ids_of(vocab_size))
    x.backward(drawn("dx", x.shape))
    cut, rank_cut = slice_of(embedding.weight), Slice((B, S, vocab_size), 2, (vocab_size,))
    own_rows = sum(region.length for region in cut.regions(grid.tensor_rank, grid.tensor))
    found = {
        "x": x.detach(),
        "embedding": gathered(embedding.weight.grad, cut, grid.tensor_group),
        "padding": torch.cat([embedding.weight.grad[own_rows:], embedding.weight.detach()[own_rows:]]),
    }
    for name, head in heads.items():
        hidden = drawn("hidden", (B, S, D)).requires_grad_()
        head.weight.grad = None
        logits = head(hidden)
        logits.backward(rank_cut.cut(drawn("dlogits", (B, S, vocab_size)), grid.tensor_rank, grid.tensor))
        found |= {name: gathered(logits.detach(), rank_cut, grid.tensor_group), f"{name} hidden": hidden.grad}
        found[f"{name} weight"] = gathered(head.weight.grad, cut, grid.tensor_group)
    return found


def all_tables() -> dict[int, dict[str, Tensor]]:
    return {vocab_size: tables(vocab_size) for vocab_size in VOCABULARIES}


@functools.cache
def tables_on_ranks(degree: int) -> list[dict[int, dict[str, Tensor]]]:
    return run_ranks(all_tables, degree)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_embedding_and_heads_are_torchs(vocab_size: int, degree: int) -> None:
    table = drawn("embedding.weight", (vocab_size, D)).requires_grad_()
    x = F.embedding(ids_of(vocab_size), table)
    x.backward(drawn("dx", x.shape))
    expected = {"x": x.detach(), "embedding": table.grad}
    for name, rows in {"tied": "embedding.weight", "own": "own.weight"}.items():
        weight, hidden = drawn(rows, (vocab_size, D)).requires_grad_(), drawn("hidden", (B, S, D)).requires_grad_()
        logits = F.linear(hidden, weight)
        logits.backward(drawn("dlogits", logits.shape))
        expected |= {name: logits.detach(), f"{name} hidden": hidden.grad, f"{name} weight": weight.grad}
    for found in (by_size[vocab_size] for by_size in tables_on_ranks(degree)):
        assert not found["padding"].any(), "a padded row is not zero or has a gradient"
        assert set(found) == {"padding", *expected}
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text, n=name: f"{n}: {text}")


def test_a_table_shows_its_cut() -> None:
    assert "[83, 6] cut along dim 0" in repr(VocabParallelEmbedding("embedding", 83, D, drawn, Grid(tensor=4)))
