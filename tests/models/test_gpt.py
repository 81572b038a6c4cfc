"""The list of layers and the loss: names, one training step with every pair of settings, classes of a variant.py, sliced ranks."""

import itertools
import math
import random

import pytest
import torch
from torch.nn import functional as F

from models import gpt
from models.attention import ATTENTIONS, Attention
from models.block import RESIDUALS, PreNormBlock
from models.config import CHOICES, VARIANT
from models.init import GPT2Init
from models.mlp import GELU
from models.norm import RMSNorm
from models.position import Learned, Position
from models.registry import REGISTRIES
from parallel.errors import Mistake
from parallel.grid import Grid
from tests.harness import run_ranks
from tests.models.helpers import on_rank
from tests.models.helpers.build import ALONE, SEED, gradients, joined, random_weights, relative, shape, values, whole_model, worst
from tests.models.helpers.dense import Dense

VOCAB = 83
SETTINGS = {
    **CHOICES,
    "bias": (True, False),
    "qkv_bias": (True, False),
    "output_bias": (True, False),
    "head_size": (8, 12),
    "qk_norm": (True, False),
    "tied": (True, False),
    "num_kv_heads": (4, 2, 1),
}


def pairs(row: dict) -> set:
    """Every two settings of a combination."""
    return set(itertools.combinations(sorted((name, str(value)) for name, value in row.items()), 2))


def pairwise(settings: dict[str, tuple]) -> list[dict]:
    """Few combinations that contain every pair of values of two settings: repeatedly the best of 30 random rows."""
    rng = random.Random(0)
    missing = set().union(*(pairs({a: x, b: y}) for a, b in itertools.combinations(settings, 2) for x in settings[a] for y in settings[b]))
    rows = []
    while missing:
        wanted = min(missing)
        candidates = ({name: rng.choice(values) for name, values in settings.items()} for _ in itertools.count())
        fitting = itertools.islice((row for row in candidates if wanted in pairs(row)), 30)
        rows.append(max(fitting, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(rows[-1])
    return rows


COMBINATIONS = pairwise(SETTINGS)


def test_the_combinations_are_few_and_leave_no_pair_out():
    met = set().union(*(pairs(row) for row in COMBINATIONS))
    for a, b in itertools.combinations(SETTINGS, 2):
        for x, y in itertools.product(SETTINGS[a], SETTINGS[b]):
            assert pairs({a: x, b: y}) <= met
    assert len(COMBINATIONS) < 60


def loss_of(model, label_smoothing: float = 0.0) -> torch.Tensor:
    """Mean over 4 × 16 fixed random tokens, in fp32."""
    tokens = torch.randint(0, VOCAB, (4, 17), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:]
    return gpt.TokenLoss(VOCAB, label_smoothing, None)(model(tokens[:, :-1]), (targets, torch.full(targets.shape, 1 / targets.numel())))


@pytest.mark.parametrize("row", COMBINATIONS, ids=lambda row: "-".join(str(value) for value in row.values()))
def test_every_combination_trains(row):
    """The loss is near log V at first, and lower after a small step along the negative gradient.

    A tied small_wang table is so wide (√(2/5h)) that it prefers the token it reads: further from log V.
    """
    model = whole_model(shape(**row))
    before = loss_of(model)
    assert abs(float(before.detach()) - math.log(VOCAB)) < (0.05 if row["init"] == "gpt2" else 0.6)
    before.backward()
    found = gradients(model)
    assert all(gradient.isfinite().all() for gradient in found.values())
    # A key's bias adds the same to every score of a query: no gradient, in theory.
    assert all(gradient.any() for name, gradient in found.items() if not name.endswith("k_norm.bias"))
    norm = torch.stack([gradient.norm() for gradient in found.values()]).norm()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 / norm * parameter.grad
    assert float(loss_of(model).detach()) < float(before.detach())


EVERYWHERE = dict(embedding_dropout=0.1, residual_dropout=0.1, mlp_dropout=0.1, attention_dropout=0.1)
LLAMA_LIKE = dict(
    norm="rmsnorm", position="rotary", residual="post_norm", mlp="swiglu", bias=False, qkv_bias=False, qk_norm=True, num_kv_heads=2,
    tied=False,
)  # fmt: skip


@pytest.mark.parametrize("degree", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
def test_every_combination_is_the_same_on_sliced_ranks(degree, sequence):
    """Logits to 1e-12 and every gradient to 1e-10 in fp64, without an engine. Every other model has all kinds of dropout.

    The truth is the plain module on one rank, which is compared with transformers and with equations elsewhere.
    """
    rows = [LLAMA_LIKE, *COMBINATIONS]
    models = [shape(**row, **(EVERYWHERE if i % 2 else {})) for i, row in enumerate(rows) if row["num_kv_heads"] % degree == 0]
    ranks = run_ranks(on_rank.random_models, degree, [(model, seed) for seed, model in enumerate(models)], sequence)
    assert len(models) >= 8 and {model.drops for model in models} == {False, True}
    for i, model in enumerate(models):
        true_logits, true_gradients = on_rank.run_model(model, random_weights(model, i), ALONE)
        logits = torch.cat([torch.from_numpy(rank[i][0]) for rank in ranks], dim=-1)[..., :VOCAB]
        assert relative(logits, torch.from_numpy(true_logits)) <= 1e-12, model
        error, name = worst(joined(model, [rank[i][1] for rank in ranks]), {n: torch.from_numpy(a) for n, a in true_gradients.items()})
        assert error <= 1e-10, (name, model)


@pytest.mark.parametrize(("degree", "sequence"), [(1, False), (2, False), (2, True), (4, False), (4, True)])
def test_a_model_that_drops_everywhere_is_the_dense_one(degree, sequence):
    """Loss and every gradient to 1e-12 in fp64, for a tied model, a vocabulary that no degree divides and every kind of recomputation.

    The reference is written from the formulas, with masks from plain integers. Measured: 1.9e-15, the loss 2.1e-16.
    """
    model = shape(tied=True, **EVERYWHERE)
    ids, targets, token_weights = on_rank.tokens()
    loss, true = Dense(model, random_weights(model, 0), on_rank.SAMPLES, SEED).run(ids, targets, token_weights.double())
    for found in zip(*run_ranks(on_rank.dropping_model, degree, model, 0, sequence), strict=True):
        assert all(abs(rank_loss - loss) <= 1e-12 * loss for rank_loss, _ in found)
        error, name = worst(joined(model, [arrays for _, arrays in found]), true)
        assert error <= 1e-12, name


def test_the_registries_are_what_the_schema_allows():
    registries = {**REGISTRIES, "attention": ATTENTIONS, "residual": RESIDUALS}
    assert {setting: tuple(classes) for setting, classes in registries.items()} == CHOICES


def names(model, grid: Grid = ALONE) -> list[str]:
    return [layer.name for layer in gpt.layers(model, grid, seed=0)]


def test_names_of_the_layers():
    assert names(shape()) == ["embedding", "position", "blocks.0", "blocks.1", "final_norm", "head"]
    assert names(shape(position="rotary")) == ["embedding", "blocks.0", "blocks.1", "final_norm", "head"]
    assert names(shape(position="alibi", residual="post_norm", num_layers=1)) == ["embedding", "blocks.0", "head"]


def test_the_list_is_the_same_on_every_rank_and_needs_none():
    """With 2 stages, 3 data ranks and 4 tensor ranks, and without a process group."""
    assert {tuple(names(shape(), Grid(2, 3, 4, rank))) for rank in range(24)} == {tuple(names(shape()))}


def test_every_parameter_knows_its_logical_name():
    """It is equal to torch's name of the parameter in the module. A tied head has no parameter of its own."""
    for tied in (True, False):
        model = whole_model(shape(tied=tied, qk_norm=True))
        assert list(values(model)) == [name for name, _ in model.named_parameters()]
        assert ("head.weight" in values(model)) != tied


def test_a_tied_head_is_the_embedding():
    model = whole_model(shape(tied=True))
    assert model.head.weight is model.embedding.weight


def test_loss_is_the_weighted_smoothed_cross_entropy():
    """Equal to torch's loss to 1e-12 in fp64. Masked tokens have no effect."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, VOCAB, generator=g, dtype=torch.float64)
    targets, weights = torch.randint(0, VOCAB, (2, 5), generator=g), torch.rand(2, 5, generator=g, dtype=torch.float64)
    weights[0, 2:] = 0
    for smoothing in (0.0, 0.1):
        true = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing)
        found = gpt.TokenLoss(VOCAB, smoothing, None)(logits, (targets, weights))
        assert abs(float(found - (weights.flatten() * true).sum())) < 1e-12
    logits[0, 2:] = 1e3 * torch.randn(3, VOCAB, generator=g, dtype=torch.float64)
    assert float(gpt.TokenLoss(VOCAB, smoothing, None)(logits, (targets, weights))) == pytest.approx(float(found), abs=1e-12)


class OwnNorm(RMSNorm):
    def forward(self, x):
        return 3 * super().forward(x)


class OwnPosition(Position):
    def rotate(self, q, k):
        return -q, k


class OwnInputPosition(Learned):
    def forward(self, x):
        return x - self.weight[: x.shape[1]]


class OwnMLP(GELU):
    def activate(self, x):
        return x.sin()


class OwnResidual(PreNormBlock):
    final_norm = False


class OwnInit(GPT2Init):
    def inner_std(self):
        return 7.0


class OwnAttention(Attention):
    def forward(self, x, samples=None):
        return -super().forward(x, samples)


OWN = {"norm": OwnNorm, "position": OwnPosition, "attention": OwnAttention, "mlp": OwnMLP, "residual": OwnResidual, "init": OwnInit}


@pytest.mark.parametrize("setting", OWN)
def test_an_experiment_s_own_class_is_used(setting):
    """A class named by `variant:Name` replaces the registered one and changes what the model computes."""
    own = OWN[setting]
    model = whole_model(shape(**{setting: f"{VARIANT}{own.__name__}"}), variants={own.__name__: own})
    plain = whole_model(shape(**({"norm": "rmsnorm"} if setting == "norm" else {"position": "none"} if setting == "position" else {})))
    if setting == "init":
        assert 6 < model.get_submodule("blocks.0").mlp.up.weight.std() < 8
    else:
        assert any(type(module) is own for module in model.modules())
        assert not torch.allclose(model(torch.arange(9)[None]), plain(torch.arange(9)[None]))
    loss_of(model).backward()
    gradients(model)


def test_an_own_position_at_the_input_is_a_layer():
    setting = {"position": f"{VARIANT}OwnInputPosition"}
    model = whole_model(shape(**setting), variants={"OwnInputPosition": OwnInputPosition})
    assert type(model.position) is OwnInputPosition
    assert type(model.get_submodule("blocks.0").attention.position) is Position  # inside attention there is none
    ids = torch.arange(9)[None]
    assert torch.allclose(model.position(model.embedding(ids)) + model.position.weight[:9], model.embedding(ids), atol=1e-7)


@pytest.mark.parametrize("setting", OWN)
def test_a_class_that_variant_py_lacks_is_refused(setting):
    with pytest.raises(Mistake, match=f"model.{setting} = 'variant:Missing', but variant.py defines no class Missing → it defines Here"):
        whole_model(shape(**{setting: "variant:Missing"}), variants={"Here": OwnMLP})
    with pytest.raises(Mistake, match="→ it defines none"):
        whole_model(shape(**{setting: "variant:Missing"}))
