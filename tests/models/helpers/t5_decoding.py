"""Small T5 decoders for tests, on one rank and on several. Imports no transformers, which would take each rank seconds."""

import functools

import torch
from torch import Tensor

from models.encoder_config import T5
from models.inference.beam_search import BeamSearchParams, beam_search
from models.inference.driver import DriverDecoder, run_worker
from models.inference.encoder_decoder import DriverT5Decoder, T5Decoder
from models.inference.sampling_params import GREEDY, SamplingParams
from parallel.grid import Grid
from tests.models.helpers.build import ALONE, fill, tensor_grid, values
from tests.models.helpers.decoding import written
from tests.models.helpers.t5 import whole_model

START, LENGTH, BEAMS = 0, 16, 4
DRAWN = SamplingParams(temperature=0.8, top_k=30, top_p=0.95)
SOURCES = [[5, 9, 33], [7, 2, 40, 21, 21, 3, 9, 11, 12, 13, 14, 15], [30], [4, 4, 17, 8, 22, 39]]


@functools.cache
def _weights(settings: str) -> dict[str, Tensor]:
    module, g = whole_model(T5.model_validate_json(settings)), torch.Generator().manual_seed(2)
    found = {name: 1.5 * tensor + 0.1 * torch.randn(tensor.shape, generator=g) for name, tensor in values(module).items()}
    found["embedding.weight"] *= 0.2  # so that the blocks decide, and not the token that was read last
    found["decoder.final_norm.weight"] *= 5
    return found


def weights(model: T5) -> dict[str, Tensor]:
    """Weights with which texts are lively: not the same token over and over."""
    return _weights(model.model_dump_json())


def decoder(model: T5, dtype: torch.dtype = torch.float32, grid: Grid = ALONE, slots: int = len(SOURCES)) -> T5Decoder:
    """With these weights; a driver on the first of several tensor ranks."""
    module = whole_model(model, grid).to(dtype)
    fill(module, {name: tensor.to(dtype) for name, tensor in weights(model).items()}, grid)
    kind = DriverT5Decoder if grid.tensor > 1 and grid.rank == 0 else T5Decoder
    return kind(module, model, grid, slots, LENGTH, START)


def on_tensor_ranks(models: list[T5], tokens: int) -> list[dict]:
    """What each model writes: greedily, drawn, and with beams. Run by the driver on tensor rank 0; an empty list on its workers."""
    grid = tensor_grid() if torch.distributed.is_initialized() else ALONE
    found = []
    for model in models:
        ours = decoder(model, grid=grid)
        if grid.rank > 0:
            run_worker(ours)
            continue
        texts = {name: written(ours, SOURCES, tokens, choice) for name, choice in (("greedy", GREEDY), ("drawn", DRAWN))}
        beams = beam_search(ours, SOURCES[1], BeamSearchParams(beams=BEAMS, max_new_tokens=tokens, ends=(1,), vocab_size=41))
        found.append(texts | {"beams": [beam.ids for beam in beams]})
        if isinstance(ours, DriverDecoder):
            ours.release()
    return found
