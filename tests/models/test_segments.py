"""Packed documents: each is computed as if it were alone, and none affects another; on tensor ranks as on one rank."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import gpt
from models.attention import Attention, Core
from models.block import PreNormBlock
from models.position import Learned
from models.segments import SEGMENTS, confined, restarted
from models.token_positions import TokenPositions
from parallel.errors import Mistake
from parallel.layers import PlainModule
from tests.harness import run_ranks
from tests.models.helpers import on_rank
from tests.models.helpers.build import ALONE, SEED, fill, gradients, random_weights, relative, shape, values, whole_model, worst

DROPOUT = dict(embedding_dropout=0.1, residual_dropout=0.2, mlp_dropout=0.1, attention_dropout=0.3)
ENDS = ((5, 6, 16), (9, 16, 16))
"""Where the documents of each row end: lengths 5, 1 and 10; 9 and 7."""
POSITIONS = ("learned", "sinusoidal", "rotary", "alibi", "none")


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, targets, samples, segments) of two rows. The documents' numbers are neither consecutive nor ascending."""
    ids, targets, _ = on_rank.tokens()
    segments = torch.stack([torch.tensor([sum(place >= end for end in row) for place in range(16)]) for row in ENDS])
    return ids, targets, on_rank.SAMPLES, torch.tensor([7, 3, 11, 5])[segments]


def packed(model, **settings) -> PlainModule:
    return PlainModule(gpt.layers(model, ALONE, SEED, context=(SEGMENTS,), **settings)).double().train()


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """'b s v', 'b s' -> 'b s' nats."""
    return F.cross_entropy(logits[..., : on_rank.VOCAB].flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


class Shifted(TokenPositions):
    """The places of a row from `first` on, from which dropout masks are computed."""

    def __init__(self, first: int) -> None:
        self.first = first

    def of(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[-2]) + self.first

    def own(self, x: Tensor) -> Tensor:
        return self.of(x)


def alone(module: PlainModule, ids: Tensor, samples: Tensor, first: int) -> Tensor:
    """Logits of one document in a row of its own: positions from 0, dropout masks from its places in the packed row."""
    for part in module.modules():
        if hasattr(part, "places") and not hasattr(part, "rotate"):
            part.places = Shifted(first)
    return module((ids[None], samples[None]))


@pytest.mark.parametrize("residual", ["pre_norm", "post_norm", "parallel"])
@pytest.mark.parametrize("position", POSITIONS)
def test_packed_equals_one_document_at_a_time(position: str, residual: str) -> None:
    """Losses and all gradients, fp64, dropout on, grouped queries."""
    model = shape(position=position, residual=residual, num_kv_heads=2, **DROPOUT)
    weights = random_weights(model, 1)
    ids, targets, samples, segments = batch()
    together, apart = packed(model), whole_model(model).double().train()
    fill(together, weights), fill(apart, weights)
    found = losses(together((ids, samples, segments)), targets)
    found.sum().backward()
    expected = torch.zeros_like(found)
    for row, ends in enumerate(ENDS):
        for first, end in zip((0, *ends), ends, strict=False):
            if end > first:
                loss = losses(alone(apart, ids[row, first:end], samples[row], first), targets[row : row + 1, first:end])
                loss.sum().backward()
                expected[row, first:end] = loss[0].detach()
    assert relative(found, expected) < 1e-12
    assert worst(gradients(together), gradients(apart))[0] < 1e-12


@pytest.mark.parametrize("position", POSITIONS)
def test_a_document_affects_neither_the_loss_nor_a_gradient_of_another(position: str) -> None:
    """Other tokens in one document: every loss and every gradient contribution of the others is the same, bit for bit."""
    model = shape(position=position, **DROPOUT)
    module = packed(model)
    fill(module, random_weights(model, 2))
    ids, targets, samples, segments = batch()
    changed = ids.clone()
    changed[0, :5] = (changed[0, :5] + 17) % on_rank.VOCAB
    others = torch.ones_like(ids, dtype=torch.bool)
    others[0, :5] = False
    results = []
    for tokens in (ids, changed):
        module.zero_grad()
        found = losses(module((tokens, samples, segments)), targets)
        found[others].sum().backward()
        results.append((found.detach(), {name: value.clone() for name, value in gradients(module).items()}))
    (first, one), (second, two) = results
    assert torch.equal(first[others], second[others]) and not torch.equal(first[0, :5], second[0, :5])
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_no_gradient_reaches_the_embeddings_of_another_document() -> None:
    """Exact zeros: the derivative of one document's loss by the vectors of all other tokens."""
    model = shape(tied=False)
    module = packed(model)
    fill(module, random_weights(model, 2))
    ids, targets, _, segments = batch()
    kept: list[Tensor] = []
    embedding = module.get_submodule("embedding")
    embedding.register_forward_hook(lambda _, __, x: (x.retain_grad(), kept.append(x))[0])
    found = losses(module((ids, segments)), targets)
    found[0, 6:].sum().backward()
    (gradient,) = (x.grad for x in kept)
    assert gradient is not None and gradient[0, 6:].abs().min() > 0
    assert torch.count_nonzero(gradient[0, :6]) == 0 and torch.count_nonzero(gradient[1]) == 0


def test_one_document_is_a_row_without_segments() -> None:
    for position in POSITIONS:
        model = shape(position=position)
        weights, (ids, _, _, segments) = random_weights(model, 3), batch()
        one, whole = packed(model), whole_model(model).double()
        fill(one, weights), fill(whole, weights)
        assert relative(one((ids, torch.zeros_like(segments))), whole(ids)) < 1e-14


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputed_blocks_see_the_segments_again(recompute: str) -> None:
    model = shape(position="rotary", **DROPOUT)
    weights, (ids, targets, samples, segments) = random_weights(model, 3), batch()
    found = []
    for setting in ("none", recompute):
        module = packed(model, recompute=setting)
        fill(module, weights)
        losses(module((ids, samples, segments)), targets).sum().backward()
        found.append(gradients(module))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_positions_restart_and_scores_are_confined() -> None:
    segments = torch.tensor([[4, 4, 1, 1, 1, 4]])
    assert restarted(segments).tolist() == [[0, 1, 0, 1, 2, 0]]
    inside = confined(segments, None, torch.float32)[0, 0] == 0
    expected = [[i >= j and segments[0, i] == segments[0, j] for j in range(6)] for i in range(6)]
    assert inside.tolist() == expected
    bias = confined(segments, torch.arange(72.0).view(2, 6, 6), torch.float32)
    assert bias.shape == (1, 2, 6, 6) and bias[0, 1, 1, 0] == 42 and bias[0, 0, 2, 0] == -torch.inf


@pytest.mark.parametrize("sequence", [False, True])
def test_two_tensor_ranks(sequence: bool) -> None:
    """Learned and rotary positions, grouped queries over both ranks, with dropout; also where each rank has half of the positions."""
    jobs = [
        shape(position="learned", vocab_size=84, **DROPOUT),
        shape(position="rotary", num_kv_heads=1, vocab_size=84, **DROPOUT),
        shape(position="alibi", vocab_size=84),
    ]
    ranks = run_ranks(packed_models, 2, jobs, sequence)
    for i, model in enumerate(jobs):
        module = packed(model)
        fill(module, random_weights(model, 1))
        ids, targets, samples, segments = batch()
        context = (samples, segments) if model.drops else (segments,)
        logits = module((ids, *context))
        assert relative(torch.cat([torch.from_numpy(rank[i]) for rank in ranks], dim=-1), logits) < 1e-12


def packed_models(jobs: list, sequence: bool) -> list:
    """This rank's logits of packed rows."""
    from tests.models.helpers.build import tensor_grid

    grid, found = tensor_grid(sequence), []
    ids, _, samples, segments = batch()
    for model in jobs:
        module = PlainModule(gpt.layers(model, grid, SEED, context=(SEGMENTS,))).double().train()
        fill(module, random_weights(model, 1), grid)
        context = (samples, segments) if model.drops else (segments,)
        found.append(module((ids, *context)).detach().numpy())
    return found


class OldBlock(PreNormBlock):
    def forward(self, x: Tensor, samples: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, samples)


class OldAttention(Attention):
    def forward(self, x: Tensor, samples: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, samples)


class OldPosition(Learned):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class OwnCore(Core):
    pass


class OwnAttention(Attention):
    core_class = OwnCore


def test_classes_of_a_variant_that_would_lose_the_segments_are_refused() -> None:
    for setting, old in (("residual", OldBlock), ("attention", OldAttention), ("position", OldPosition)):
        model, variants = shape(**{setting: f"variant:{old.__name__}"}), {old.__name__: old}
        gpt.layers(model, ALONE, SEED, variants)  # no segments: nothing to lose
        with pytest.raises(Mistake, match=rf"model.{setting} = 'variant:{old.__name__}': its forward takes no segments, .*'stream'"):
            gpt.layers(model, ALONE, SEED, variants, context=(SEGMENTS,))
    model = shape(attention="variant:OwnAttention")
    own, given = packed(model, variants={"OwnAttention": OwnAttention}), packed(shape())
    ids, _, _, segments = batch()
    assert torch.equal(own((ids, segments)), given((ids, segments))) and values(own).keys() == values(given).keys()
