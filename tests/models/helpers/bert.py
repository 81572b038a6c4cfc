"""A small BERT for the tests: settings with one thing changed, a batch with padding, and what ranks run. Imports no transformers."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from models import bert
from models.encoder_config import BERT
from models.segments import SEGMENTS
from parallel.grid import Grid
from parallel.layers import PlainModule
from tests.models.helpers.build import ALONE, SEED, as_arrays, fill, gradients, scatter, tensor_grid, values

VOCAB, LENGTH = 83, 16
SHAPE = dict(
    num_layers=2, hidden_size=32, num_heads=4, ffn_size=48, vocab_size=VOCAB, seq_length=LENGTH, token_types=2, norm_eps=1e-12, mlp="gelu",
    residual="post_norm", init="gpt2", sentence_head=True, embedding_dropout=0.0, residual_dropout=0.0, mlp_dropout=0.0,
    attention_dropout=0.0,
)  # fmt: skip
EVERYWHERE = dict(embedding_dropout=0.1, residual_dropout=0.2, mlp_dropout=0.1, attention_dropout=0.3)
CONTEXT = (SEGMENTS, bert.TOKEN_TYPES)
SAMPLES, LENGTHS, FIRST_SENTENCES = torch.tensor([4, 1_000]), (16, 11), (9, 4)
"""The numbers of the batch's samples, their lengths without padding, and the lengths of their first sentences."""


def shape(**changes) -> BERT:
    """SHAPE with settings replaced."""
    return BERT(**SHAPE | changes)


def whole_model(model: BERT, grid: Grid = ALONE, context: tuple[str, ...] = CONTEXT, **settings) -> PlainModule:
    """All layers in this process (on this tensor rank)."""
    return PlainModule(bert.layers(model, grid, SEED, context=context, **settings))


def random_weights(model: BERT, seed: int = 0) -> dict[str, Tensor]:
    """Whole weights in fp64, far from initial values."""
    module = whole_model(model).double()
    scatter(module, seed)
    return values(module)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """(ids, segments, token types), 'b s' each. Padding has id 0 and segment −1; no other token has id 0."""
    ids = torch.randint(1, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    places = torch.arange(LENGTH)
    padding = places >= torch.tensor(LENGTHS)[:, None]
    types = (places >= torch.tensor(FIRST_SENTENCES)[:, None]) & ~padding
    return ids.masked_fill(padding, 0), torch.where(padding, -1, torch.tensor([[7], [3]])), types.long()


def labels(dtype: torch.dtype, sentence_head: bool = True) -> tuple[Tensor, ...]:
    """What the loss takes beside the logits. About half of the tokens have a weight, and no padding."""
    g = torch.Generator().manual_seed(4)
    targets, weights = torch.randint(0, VOCAB, (2, LENGTH), generator=g), torch.rand(2, LENGTH, generator=g)
    weights = weights.masked_fill((weights < 0.5) | (inputs()[1] < 0), 0.0).to(dtype)
    return (targets, weights, torch.tensor([1, 0]), torch.tensor([0.25, 0.75], dtype=dtype))[: 4 if sentence_head else 2]


def loss_of(model: BERT, grid: Grid = ALONE) -> bert.PretrainingLoss | bert.TokenLoss:
    return (bert.PretrainingLoss if model.sentence_head else bert.TokenLoss)(model.vocab_size, 0.0, grid.tensor_group)


def run(model: BERT, weights: Mapping[str, Tensor], grid: Grid = ALONE, recompute: str = "none") -> dict[str, np.ndarray]:
    """This rank's "logits" and "sentence_logits", the "loss", and the gradients by name, with these whole weights, in their precision."""
    dtype = next(iter(weights.values())).dtype
    module = whole_model(model, grid, recompute=recompute).to(dtype)
    fill(module, weights, grid)
    ids, *context = inputs()
    output = module((ids, *([SAMPLES] if model.drops else []), *context))
    loss = loss_of(model, grid)(output, labels(dtype, model.sentence_head))
    loss.backward()
    logits = dict(zip(("logits", "sentence_logits"), output if model.sentence_head else (output,), strict=False))
    return as_arrays(logits | {"loss": loss} | gradients(module))


def run_all(jobs: list[tuple[BERT, Mapping[str, np.ndarray], str]], sequence: bool) -> list[dict[str, np.ndarray]]:
    """`run` of each (settings, whole weights, recomputation) with all ranks on the tensor axis."""
    grid = tensor_grid(sequence)
    return [run(model, {name: torch.from_numpy(a) for name, a in weights.items()}, grid, how) for model, weights, how in jobs]
