"""Functions that ranks run for the tests of models/. Imports no transformers, which would take each rank seconds.

Ranks return numpy arrays, which travel between processes by value.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import gpt
from models.config import GPT
from models.norm import NORMS
from parallel.engines.deepspeed_config import EngineSettings
from parallel.engines.engine import make_engine
from parallel.grid import Grid, make_grid
from parallel.layers import PlainModule
from tests.models.helpers.build import SEED, as_arrays, fill, gradients, made, random_weights, shape, tensor_grid, whole_model

VOCAB, LENGTH, BATCH = 83, 16, 2
SAMPLES = torch.tensor([4, 1_000])


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """(ids, targets, weights): 'b s' each; the weights differ from token to token, some are zero."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=g)
    return ids[:, :-1], ids[:, 1:], torch.rand(BATCH, LENGTH, generator=g).round(decimals=1)


def whole_models(jobs: list[tuple[GPT, dict[str, np.ndarray]]], sequence: bool = False) -> list[tuple]:
    """[(settings, whole weights)] -> [(this rank's logits, its gradients)] of a token loss, in the weights' precision.

    Arrays, since every tensor that is handed to a new process takes a file descriptor, of which there are 256.
    """
    grid = tensor_grid(sequence)
    return [run_model(model, {name: torch.from_numpy(array) for name, array in weights.items()}, grid) for model, weights in jobs]


def random_models(jobs: list[tuple[GPT, int]], sequence: bool) -> list[tuple]:
    """The same with weights that every rank draws from a seed, because those of many models are too large to pass to processes."""
    grid = tensor_grid(sequence)
    return [run_model(model, random_weights(model, seed), grid) for model, seed in jobs]


def run_model(model: GPT, weights: dict[str, Tensor], grid: Grid, variants: Mapping[str, type] | None = None) -> tuple:
    """(This rank's logits, its gradients by logical name) of a token loss, of the model with these whole weights."""
    module = whole_model(model, grid, variants=variants).to(next(iter(weights.values())).dtype)
    fill(module, weights, grid)
    ids, targets, token_weights = tokens()
    logits = module((ids, SAMPLES) if model.drops else ids)
    gpt.TokenLoss(model.vocab_size, 0.0, grid.tensor_group)(logits, (targets, token_weights)).backward()
    return logits.detach().numpy(), as_arrays(gradients(module))


def dropping_model(model: GPT, seed: int, sequence: bool) -> list[tuple[float, dict]]:
    """(loss, this rank's gradients) in fp64 of a model with dropout, without recomputation and with either kind."""
    grid, weights, (ids, targets, token_weights) = tensor_grid(sequence), random_weights(model, seed), tokens()
    found = []
    for recompute in ("none", "selective", "full"):
        module = PlainModule(gpt.layers(model, grid, SEED, recompute=recompute)).double()
        fill(module, weights, grid)
        loss = gpt.TokenLoss(model.vocab_size, 0.0, grid.tensor_group)(module((ids, SAMPLES)), (targets, token_weights.double()))
        loss.backward()
        found.append((float(loss.detach()), as_arrays(gradients(module))))
    return found


def run_part(kind: str, model: GPT, weights: dict[str, Tensor], x: Tensor, dy: Tensor, grid: Grid) -> dict[str, Tensor]:
    """y, x's gradient "dx" and the parameters' own by name, where y's gradient is dy; fp64."""
    module = made(kind, model, grid).double()
    fill(module, weights, grid)
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, **gradients(module)}


def run_parts(jobs: list[tuple]) -> list[dict]:
    """`run_part` of each job (without its grid) with all ranks on the tensor axis."""
    grid = tensor_grid()
    return [as_arrays(run_part(*job, grid)) for job in jobs]


def own_halves_normalised(norm: str, x: Tensor, weights: dict[str, Tensor], dy: Tensor) -> dict[str, Any]:
    """Rank i normalises its half of dim 0. Returns its gradients."""
    grid = tensor_grid()
    module = NORMS[norm]("norm", x.shape[-1], shape(norm=norm), partial_group=grid.tensor_group).double()
    fill(module, weights, grid)
    module(x.chunk(2)[grid.tensor_rank]).backward(dy.chunk(2)[grid.tensor_rank])
    return as_arrays(gradients(module))


def drawn_under_zero_3(model: GPT, tensor: int, seed: int) -> dict[str, Any]:
    """Whole fp32 master weights of a ZeRO-3 engine in bf16 before its first step."""
    grid = make_grid(1, tensor)
    settings = EngineSettings(
        precision="bf16", zero_stage=3, micro_batch_size=1, micro_batches=1, clip=0.0, lr=1e-3, betas=(0.9, 0.95), eps=1e-8,
        weight_decay=0.0,
    )  # fmt: skip
    layers = gpt.layers(model, grid, seed)
    return as_arrays(dict(make_engine(layers, gpt.TokenLoss(model.vocab_size, 0.0, grid.tensor_group), grid, settings).full_weights()))
