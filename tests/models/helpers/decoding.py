"""Small decoders for tests, on one rank and on several. Imports no transformers, which would take each rank seconds."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.config import GPT
from models.inference.beam_search import BeamSearchParams, beam_search
from models.inference.decoder import Decoder
from models.inference.driver import DriverDecoder, run_worker
from models.inference.sampling import Row, next_tokens
from models.inference.sampling_params import GREEDY, SamplingParams
from parallel.grid import Grid
from parallel.layers import PlainModule
from tests.models.helpers.build import ALONE, fill, random_weights, shape, tensor_grid, whole_model

LENGTH = 24
DRAWN = SamplingParams(temperature=0.8, top_k=40, top_p=0.95, repetition_penalty=1.1)
PROMPTS = [[5], [7, 2, 80, 41, 41, 3, 9], [1, 2, 3], [60, 61, 62, 63, 64]]


def longer(**changes) -> GPT:
    """`shape` with room for LENGTH tokens."""
    return shape(**{"seq_length": LENGTH} | changes)


def filled(
    model: GPT, grid: Grid = ALONE, seed: int = 1, dtype: torch.dtype = torch.float32, variants: Mapping[str, type] | None = None
) -> PlainModule:
    """A model with this rank's slices of weights that are far from initial values."""
    module = whole_model(model, grid, variants=variants).to(dtype)
    fill(module, {name: tensor.to(dtype) for name, tensor in random_weights(model, seed, variants).items()}, grid)
    return module.eval()


def logits_of(module: PlainModule, model: GPT, ids: Sequence[int]) -> Tensor:
    """'v' after some ids, without a cache."""
    with torch.no_grad():
        return module(torch.tensor([ids]))[0, -1, : model.vocab_size].float()


def written(decoder: Decoder, prompts: Sequence[Sequence[int]], tokens: int, choice: SamplingParams = GREEDY) -> list[list[int]]:
    """The continuations of all prompts, decoded together, with seed 10 for the first, 11 for the second, …"""
    found: list[list[int]] = [[] for _ in prompts]
    logits = decoder.admit(prompts)
    for i in range(tokens):
        rows = [Row(choice, 10 + k, prompt, ids) for k, (prompt, ids) in enumerate(zip(prompts, found, strict=True))]
        for ids, token in zip(found, next_tokens(logits, rows), strict=True):
            ids.append(token)
        if i + 1 < tokens:
            logits = decoder.step([ids[-1] for ids in found])
    decoder.clear()
    return found


def on_tensor_ranks(models: list[GPT], choices: list[SamplingParams], tokens: int) -> list[list[list[list[int]]]]:
    """[model][choice] -> `written`, by the driver on tensor rank 0; an empty list on the other ranks, which are workers."""
    grid, found = tensor_grid(), []
    for model in models:
        decoder_class = DriverDecoder if grid.rank == 0 and grid.tensor > 1 else Decoder
        decoder = decoder_class(filled(model, grid), model, grid, len(PROMPTS), LENGTH)
        if grid.rank > 0:
            run_worker(decoder)
            continue
        found.append([written(decoder, PROMPTS, tokens, choice) for choice in choices])
        if isinstance(decoder, DriverDecoder):
            decoder.release()
    return found


def carried_out(decoder: Decoder) -> dict[str, Any]:
    """Logits after calls of every method, as arrays, and the beams of a search."""
    found = [decoder.admit(PROMPTS[:3]), decoder.step([1, 2, 3])]
    decoder.drop(0)
    found.append(decoder.step([4, 5]))
    decoder.reorder([1, 1, 0])
    found.append(decoder.step([6, 7, 8]))
    decoder.clear()
    found.append(decoder.admit([list(range(20))]))
    decoder.clear()
    beams = beam_search(decoder, PROMPTS[1], BeamSearchParams(3, 8, (3,)))
    return {"logits": [logits.numpy() for logits in found], "beams": [(beam.ids, beam.score) for beam in beams]}


def carried_out_by_driver(model: GPT, variants: Mapping[str, type] | None = None) -> dict[str, Any] | None:
    """`carried_out` by the driver on tensor rank 0; None on the other ranks, which are workers."""
    grid = tensor_grid()
    if grid.rank > 0:
        run_worker(Decoder(filled(model, grid, variants=variants), model, grid, 4, LENGTH))
        return None
    driver = DriverDecoder(filled(model, grid, variants=variants), model, grid, 4, LENGTH)
    found = carried_out(driver)
    driver.release()
    return found
