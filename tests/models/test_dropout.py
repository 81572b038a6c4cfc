"""Dropout masks against the same hash in plain integers, their statistics, their slices, and attention with dropped probabilities."""

import hashlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from models.attention import Core, DroppingCore
from models.dropout import Dropout, dropped, mixed
from models.position import alibi_slopes
from models.seed import seed_of
from parallel.grid import Grid
from tests.models.helpers.build import ALONE, gradients, relative, shape, whole_model
from tests.models.helpers.integers import M64, is_dropped, true_place

SEED = 7
EVERYWHERE = dict(embedding_dropout=0.1, residual_dropout=0.1, mlp_dropout=0.1, attention_dropout=0.1)


def queries(heads: int, length: int) -> Tensor:
    """'b h s e' of which only the shape counts."""
    return torch.empty(1, heads, length, 4)


# The hash, once more, in integers.


def kept(p: float, samples, positions=64, features=256, name="layer", seed=SEED, first=0, first_feature=0) -> Tensor:
    """'b s d' bool: what the library keeps of a whole layer."""
    places = mixed(seed_of(seed, f"{name}.dropout"), torch.as_tensor(samples), torch.arange(first, first + positions))
    return ~dropped(places, torch.arange(first_feature, first_feature + features), p)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9, 0.999])
def test_the_mask_is_that_of_plain_integers(p):
    samples = [0, 1, 12_345, 2**40 + 3]
    found = ~kept(p, samples, positions=6, features=9)
    for (i, sample), position, feature in itertools.product(enumerate(samples), range(6), range(9)):
        assert bool(found[i, position, feature]) == is_dropped(true_place("layer", sample, position, SEED), feature, p)


def test_the_module_s_mask_is_that_of_plain_integers():
    y = Dropout("layer", 0.3, SEED, ALONE)(torch.ones(2, 5, 7), torch.tensor([4, 9]))
    for (i, sample), position, feature in itertools.product(enumerate([4, 9]), range(5), range(7)):
        assert (y[i, position, feature] == 0) == is_dropped(true_place("layer", sample, position, SEED), feature, 0.3)


def test_attention_s_mask_is_that_of_plain_integers():
    """Key u of head h is feature number h·2³² + u of the query's position."""
    mask = DroppingCore("layer", 0.4, SEED, ALONE).mask(torch.tensor([3, 8]), queries(3, 5), queries(3, 5))
    for (i, sample), head, t, u in itertools.product(enumerate([3, 8]), range(3), range(5), range(5)):
        assert bool(mask[i, head, t, u]) == is_dropped(true_place("layer", sample, t, SEED), (head << 32) + u, 0.4)


GOLDEN_PLACES = ["2a2e5ad0c43bb8db", "72319c168bfe7ab9"]
GOLDEN_MASK = "c8a69bf7e1ae3d7b7844c30cb7c63708223b07bee22fec2ef791c8807fd7f1cb"


def test_the_hash_is_the_one_that_earlier_runs_used():
    """Golden values: with another mask, a resumed run would not continue the same run."""
    digest = hashlib.sha256(kept(0.1, [0, 1, 2**33]).numpy().tobytes()).hexdigest()
    assert [f"{int(x) & M64:016x}" for x in mixed(seed_of(SEED, "layer.dropout"), torch.tensor([5]), torch.arange(2))[0]] == GOLDEN_PLACES
    assert digest == GOLDEN_MASK


def attention_mask(p: float) -> Tensor:
    """'b h s s' of eight samples and heads."""
    return DroppingCore("layer", p, SEED, ALONE).mask(torch.arange(8), queries(8, 64), queries(8, 64))


# Statistics. Everything is fixed, so a bound of five deviations is met once and for all.


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_rate_is_binomial(p):
    """The rates of a layer, of an attention, and of every position and every feature deviate as much as random ones, not more nor less."""
    mask = kept(p, range(32))
    assert abs(float(mask.double().mean()) - (1 - p)) <= 5 * math.sqrt(p * (1 - p) / mask.numel())
    heads = ~attention_mask(p)
    assert abs(float(heads.double().mean()) - (1 - p)) <= 5 * math.sqrt(p * (1 - p) / heads.numel())
    for sums, n in ((mask.sum(2), 256), (mask.sum((0, 1)), 32 * 64), (mask.sum((1, 2)), 64 * 256), (heads.sum((0, 2, 3)), 8 * 64 * 64)):
        dispersion = float(((sums.double() - n * (1 - p)) ** 2).mean() / (n * p * (1 - p)))
        assert abs(dispersion - 1) <= 5 * math.sqrt(2 / sums.numel()), (n, dispersion)


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two masks."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


EPOCH = 1_000_003
PAIRS = torch.triu_indices(64, 64, 1)
NEIGHBOURS = {
    "layers": lambda p: (kept(p, range(8), name="blocks.0.mlp"), kept(p, range(8), name="blocks.1.mlp")),
    "places of one block": lambda p: (kept(p, range(8), name="blocks.0.mlp"), kept(p, range(8), name="blocks.0.mlp.residual")),
    "seeds": lambda p: (kept(p, range(8), seed=1), kept(p, range(8), seed=2)),
    "samples": lambda p: (kept(p, range(8)), kept(p, range(1, 9))),
    "samples and positions, against each other": lambda p: (kept(p, range(8), first=1), kept(p, range(1, 9))),
    "epochs": lambda p: (kept(p, range(8)), kept(p, range(EPOCH, EPOCH + 8))),
    "positions": lambda p: (kept(p, range(8)), kept(p, range(8), first=1)),
    "positions a power of two apart": lambda p: (kept(p, range(8)), kept(p, range(8), first=4096)),
    "features": lambda p: (kept(p, range(8)), kept(p, range(8), first_feature=1)),
    "features a power of two apart": lambda p: (kept(p, range(8)), kept(p, range(8), first_feature=1024)),
    "positions and features": lambda p: (kept(p, range(8), first=1), kept(p, range(8), first_feature=1)),
    "heads": lambda p: (mask := attention_mask(p), mask.roll(1, 1)),
    "queries of a head": lambda p: (mask := attention_mask(p), mask.roll(1, 2)),
    "query and key, exchanged": lambda p: (attention_mask(p)[..., *PAIRS], attention_mask(p)[..., *PAIRS.flip(0)]),
}


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("pair", NEIGHBOURS)
def test_neighbours_are_independent(pair, p):
    a, b = NEIGHBOURS[pair](p)
    assert a.numel() >= 100_000
    assert abs(correlation(a, b)) <= 5 / math.sqrt(a.numel())


def test_no_position_is_a_shifted_or_permuted_copy_of_another():
    """32 positions of 1,024 features: every pair, shifted by every d and with features f and f xor d exchanged.

    A million pairs: the largest of that many of unit variance is 4.9 on average, 6 is allowed.
    """
    x = kept(0.5, [0, 1], positions=16, features=1024).flatten(0, 1).float() * 2 - 1
    f = torch.arange(1024)
    for d in range(1024):
        for moved in ((f + d) % 1024, f ^ d):
            products = x @ x[:, moved].T / math.sqrt(1024)
            products.diagonal().div_(math.sqrt(2) if d else torch.inf)  # with itself: f's product with f xor d is met twice
            assert products.abs().max() <= 6, d


def chi_squared(values: Tensor, kinds: int) -> float:
    """In standard deviations from what uniform numbers give."""
    counts = torch.bincount(values.flatten().to(torch.int64), minlength=kinds).double()
    mean = values.numel() / kinds
    return float((((counts - mean) ** 2 / mean).sum() - (kinds - 1)) / math.sqrt(2 * (kinds - 1)))


def test_every_byte_of_a_place_is_uniform():
    """Over consecutive samples and positions, which is what is hashed."""
    places = mixed(seed_of(SEED, "layer.dropout"), torch.arange(512), torch.arange(512))
    for shift in range(0, 64, 8):
        assert abs(chi_squared(places >> shift & 255, 256)) <= 5, shift


def test_the_number_that_decides_is_uniform():
    """Its highest six bits are how many of 63 thresholds lie below it: over positions, over features and over both."""
    for positions, features in ((256, 256), (1, 1 << 16), (1 << 16, 1)):
        places = mixed(seed_of(SEED, "layer.dropout"), torch.tensor([11]), torch.arange(positions))
        bits = sum(~dropped(places, torch.arange(features), k / 64) for k in range(1, 64))
        assert abs(chi_squared(bits, 64)) <= 5, (positions, features)


def test_a_larger_p_drops_what_a_smaller_one_does_and_more():
    assert not (~kept(0.1, range(4)) & kept(0.3, range(4))).any()


# Slices.


def described(tensor: int, rank: int, sequence: bool = False) -> Grid:
    """A grid with a group that only has a rank, which determines the slice."""
    group = SimpleNamespace(rank=lambda: rank, size=lambda: tensor)
    return Grid(tensor=tensor, rank=rank, tensor_group=group, sequence=sequence)


X = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SAMPLES = torch.tensor([6, 2, 900])


@pytest.mark.parametrize("tensor", [2, 4])
def test_slices_of_features_positions_and_samples_are_slices_of_the_whole(tensor):
    whole = Dropout("layer", 0.3, SEED, ALONE)(X, SAMPLES)
    for rank in range(tensor):
        inside = Dropout("layer", 0.3, SEED, described(tensor, rank), sliced=True)
        assert torch.equal(inside(X.chunk(tensor, 2)[rank], SAMPLES), whole.chunk(tensor, 2)[rank])
        inside = Dropout("layer", 0.3, SEED, described(tensor, rank, sequence=True), sliced=True)
        assert torch.equal(inside(X.chunk(tensor, 2)[rank], SAMPLES), whole.chunk(tensor, 2)[rank])
        outside = Dropout("layer", 0.3, SEED, described(tensor, rank, sequence=True))
        assert torch.equal(outside(X.chunk(tensor, 1)[rank], SAMPLES), whole.chunk(tensor, 1)[rank])
        assert torch.equal(Dropout("layer", 0.3, SEED, described(tensor, rank))(X, SAMPLES), whole)
    for row in range(3):
        assert torch.equal(Dropout("layer", 0.3, SEED, ALONE)(X[row : row + 1], SAMPLES[row : row + 1]), whole[row : row + 1])


@pytest.mark.parametrize("tensor", [2, 4])
def test_a_rank_s_heads_are_dropped_as_on_one_rank(tensor):
    whole = DroppingCore("layer", 0.3, SEED, ALONE).mask(SAMPLES, queries(8, 16), queries(8, 16))
    for rank in range(tensor):
        own = DroppingCore("layer", 0.3, SEED, described(tensor, rank)).mask(SAMPLES, queries(8 // tensor, 16), queries(8 // tensor, 16))
        assert torch.equal(own, whole.chunk(tensor, 1)[rank])


def test_a_shorter_sequence_is_dropped_as_the_beginning_of_a_longer_one():
    core = DroppingCore("layer", 0.3, SEED, ALONE)
    assert torch.equal(core.mask(SAMPLES, queries(4, 9), queries(4, 9)), core.mask(SAMPLES, queries(4, 16), queries(4, 16))[..., :9, :9])


# The module.


def test_value_and_gradient_are_the_mask_over_what_is_kept():
    x, dropout = X.clone().requires_grad_(), Dropout("layer", 0.25, SEED, ALONE)
    y = dropout(x, SAMPLES)
    mask = kept(0.25, SAMPLES, 16, 24).double() / 0.75
    assert torch.equal(y.detach(), X * mask)
    y.backward(dy := torch.randn(X.shape, dtype=torch.float64))
    assert torch.equal(x.grad, dy * mask)


def test_what_is_not_finite_can_be_dropped():
    assert Dropout("layer", 0.5, SEED, ALONE)(torch.full((1, 8, 8), torch.inf), torch.tensor([0])).isnan().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype):
    x = X.to(dtype).requires_grad_()
    y = Dropout("layer", 0.3, SEED, ALONE)(x, SAMPLES)
    assert y.dtype == dtype
    assert torch.equal(y, (x.float() * kept(0.3, SAMPLES, 16, 24) / 0.7).to(dtype))
    y.sum().backward()
    assert torch.equal(x.grad != 0, kept(0.3, SAMPLES, 16, 24))


def test_evaluation_and_no_dropout_pass_the_tensor_itself():
    assert Dropout("layer", 0.5, SEED, ALONE).eval()(X, SAMPLES) is X
    assert Dropout("layer", 0.5, SEED, ALONE).eval()(X, None) is X
    assert Dropout("layer", 0.0, SEED, ALONE)(X, SAMPLES) is X
    assert Dropout("layer", 0.0, SEED, ALONE)(X, None) is X


def test_training_without_the_samples_numbers_is_refused():
    """A block that does not pass them on would otherwise train without dropout, and nobody would notice."""
    with pytest.raises(ValueError, match="samples' numbers"):
        Dropout("layer", 0.1, SEED, ALONE)(X, None)
    with pytest.raises(ValueError, match="samples' numbers"):
        DroppingCore("layer", 0.1, SEED, ALONE)(*heads_of(4), None, None)
    with pytest.raises(ValueError, match="samples' numbers"):
        whole_model(shape(**EVERYWHERE))(torch.arange(8)[None])
    whole_model(shape(**EVERYWHERE)).eval()(torch.arange(8)[None])


# Attention.


def heads_of(kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """q of eight heads, k and v of `kv`: 'b h s e', fp64."""
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(3, heads, 10, 6, generator=g, dtype=torch.float64).requires_grad_() for heads in (8, kv, kv))


def explicit(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, p: float) -> Tensor:
    """Head by head: softmax over the past, with entries dropped by the integer hash, times v."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    t = torch.arange(length)
    y = []
    for h in range(q.shape[1]):
        scores = torch.einsum("bte,bue->btu", q[:, h], k[:, h // group]) / math.sqrt(q.shape[-1])
        if slopes is not None:
            scores = scores - slopes[h] * (t[:, None] - t[None, :])
        weights = scores.masked_fill(t[None, :] > t[:, None], -math.inf).softmax(-1)
        mask = torch.tensor(
            [
                [[is_dropped(true_place("layer", int(sample), i, SEED), (h << 32) + j, p) for j in range(length)] for i in range(length)]
                for sample in SAMPLES
            ]
        )
        y.append(weights * ~mask / (1 - p) @ v[:, h // group])
    return torch.stack(y, 1)


@pytest.mark.parametrize("alibi", [False, True], ids=["causal", "alibi"])
@pytest.mark.parametrize("kv", [8, 2])
def test_dropped_attention_is_the_explicit_one(kv, alibi):
    """Values and gradients of q, k and v, to 1e-12."""
    q, k, v = heads_of(kv)
    slopes = torch.tensor(alibi_slopes(8), dtype=torch.float64)
    t = torch.arange(10)
    bias = (-slopes[:, None, None] * (t[:, None] - t[None, :])).masked_fill(t[None, :] > t[:, None], -math.inf) if alibi else None
    found = DroppingCore("layer", 0.3, SEED, ALONE)(q, k, v, bias, SAMPLES)
    true = explicit(q, k, v, slopes if alibi else None, 0.3)
    dy = torch.randn(true.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert relative(found, true) <= 1e-12
    for mine, theirs in zip(torch.autograd.grad(found, (q, k, v), dy), torch.autograd.grad(true, (q, k, v), dy), strict=True):
        assert relative(mine, theirs) <= 1e-12


@pytest.mark.parametrize("kv", [8, 2])
def test_in_evaluation_it_is_the_fused_one(kv):
    inputs = heads_of(kv)
    plain = Core("layer", 0.0, SEED, ALONE)(*inputs, None, None)
    assert torch.equal(DroppingCore("layer", 0.3, SEED, ALONE).eval()(*inputs, None, SAMPLES), plain)
    assert relative(DroppingCore("layer", 1e-12, SEED, ALONE)(*inputs, None, SAMPLES), plain) <= 1e-11


def test_in_bf16_the_softmax_is_taken_in_fp32():
    inputs = [x.detach() for x in heads_of(8)]
    core = DroppingCore("layer", 0.3, SEED, ALONE)
    low = core(*(x.bfloat16() for x in inputs), None, SAMPLES)
    assert low.dtype == torch.bfloat16
    assert relative(low, core(*inputs, None, SAMPLES)) <= 0.01


# The whole model.


@pytest.mark.parametrize("place", EVERYWHERE)
def test_every_place_drops_in_training_and_only_there(place):
    """Another sample index changes the logits. In evaluation the logits are those of a model without dropout, bit for bit."""
    ids = torch.arange(12).repeat(2, 1)
    model, plain = whole_model(shape(**{place: 0.2})), whole_model(shape())
    one, other = model((ids, torch.tensor([0, 1]))), model((ids, torch.tensor([0, 2])))
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1]) and not torch.equal(one[0], one[1])
    assert torch.equal(model.eval()((ids, torch.tensor([0, 1]))), plain(ids))


def test_no_two_layers_share_a_mask():
    """Each has a key of its own: four dropout layers in each of two blocks."""
    model = whole_model(shape(**EVERYWHERE))
    keys = [module.key for module in model.modules() if hasattr(module, "key")]
    assert len(keys) == len(set(keys)) == 1 + 2 * 4


def test_every_parameter_still_has_a_gradient():
    model = whole_model(shape(**EVERYWHERE))
    model((torch.arange(12)[None], torch.tensor([5]))).square().sum().backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
