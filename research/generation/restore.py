"""Restores a model from a run's checkpoint: a decoder that generates or a scorer of given tokens, on any number of tensor ranks, or an
encoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel

from models import architectures, bert
from models.config import GPT, VARIANT
from models.conversion.read_config import NO_DROPOUT
from models.encoder_config import BERT, T5, AnyModel
from models.inference.decoder import Decoder
from models.inference.driver import DriverDecoder, DriverScorer, run_worker
from models.inference.encoder_decoder import DriverT5Decoder, T5Decoder
from models.inference.scoring import TokenScorer
from models.init import UninitializedWeights
from models.segments import SEGMENTS
from parallel.checkpoint.reader import Reader, load_weights
from parallel.distributed import PRECISIONS, device
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import PlainModule
from research.config import serialization
from research.config.experiment_folder import load_variants
from research.tracking.run_folder import RunFolder

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class DecoderSpec:
    """What a decoder is restored from, and its size. It is the same on every rank and can be pickled for other processes."""

    run: Path
    """The run's folder."""
    checkpoint: Path | None
    """None: the model has the initial weights of the run's seed."""
    precision: str | None = None
    """fp32, bf16 or fp16; None: the precision of training, except that fp16 becomes fp32 on a CPU, which has few kernels for it."""
    slots: int = 1
    """The number of texts that are generated at once."""
    context: int = 1
    """The maximum number of tokens of each text: prompt included, or for an encoder–decoder those of the target."""
    start: int | None = None
    """The token that a target begins with; None for a decoder-only model."""

    def on(self, grid: Grid, place: torch.device | None = None) -> Decoder:
        """This rank's decoder on `place` (None: this rank's device); with several tensor ranks, rank 0 drives the others."""
        model, drives = model_of(self.run), grid.tensor > 1 and grid.rank == 0
        module = restored(self, grid, place)
        if isinstance(model, T5):
            assert self.start is not None
            return (DriverT5Decoder if drives else T5Decoder)(module, model, grid, self.slots, self.context, self.start)
        return (DriverDecoder if drives else Decoder)(module, model, grid, self.slots, self.context)

    def follow(self, grid: Grid) -> None:
        """The work of a tensor rank > 0: carries out what rank 0 broadcasts until rank 0 releases it."""
        run_worker(self.on(grid))


@dataclass(frozen=True)
class ScorerSpec:
    """What a scorer is restored from. It is the same on every rank and can be pickled for other processes."""

    run: Path
    checkpoint: Path
    precision: str | None = None
    """As in DecoderSpec."""

    def on(self, grid: Grid) -> TokenScorer:
        """This rank's scorer; with several tensor ranks, rank 0 drives the others."""
        model = model_of(self.run)
        assert isinstance(model, GPT)
        scorer_class = DriverScorer if grid.tensor > 1 and grid.rank == 0 else TokenScorer
        return scorer_class(restored(DecoderSpec(self.run, self.checkpoint, self.precision), grid), model, grid)

    def follow(self, grid: Grid) -> None:
        """The work of a tensor rank > 0: carries out what rank 0 broadcasts until rank 0 releases it."""
        run_worker(self.on(grid))


PLAIN: dict[str, type[GPT] | type[BERT] | type[T5]] = {"gpt": GPT, "bert": BERT, "t5": T5}
"""`model.kind` -> its settings without the checks of an experiment, which a run's models are built from."""


def model_of(run: Path) -> AnyModel:
    """The settings of a run's model."""
    model = serialization.load(RunFolder(run).config).model
    return PLAIN[model.kind](**model.model_dump())


def restored(spec: DecoderSpec, grid: Grid, place: torch.device | None = None) -> PlainModule:
    """The module with the checkpoint's weights on `place` (None: this rank's device): each rank's own slices, whatever layout saved them.

    Without a checkpoint it keeps its initial weights.

    Executes the variant.py that the run folder holds a copy of.
    """
    folder, place = RunFolder(spec.run), place or device()
    experiment = serialization.load(folder.config)
    model, variants = model_of(spec.run), dict(load_variants(folder.source, experiment.model))
    context = (SEGMENTS,) if isinstance(model, T5) else ()
    # an init class of the experiment may serve other classes of its variant.py
    if spec.checkpoint is not None and not model.init.startswith(VARIANT):
        model, variants = without_init(model, variants)
    module = PlainModule(architectures.layers(model, grid, experiment.seed, variants, context=context))
    return _with_weights(module, spec, grid, experiment.precision, place)


def restored_encoder(spec: DecoderSpec) -> PlainModule:
    """The encoder of a BERT's run on this rank's device, without its heads: (ids 'b s', segments 'b s') -> (x 'b s d', segments).

    Executes the variant.py that the run folder holds a copy of.
    """
    folder = RunFolder(spec.run)
    experiment, settings = serialization.load(folder.config), model_of(spec.run)
    assert isinstance(settings, BERT)
    model, variants = settings.model_copy(update=NO_DROPOUT), dict(load_variants(folder.source, experiment.model))
    if not model.init.startswith(VARIANT):
        model, variants = without_init(model, variants)
    module = PlainModule(bert.encoder_layers(model, Grid(), experiment.seed, variants, context=(SEGMENTS,)))
    return _with_weights(module, spec, Grid(), experiment.precision, device())


def _with_weights(module: PlainModule, spec: DecoderSpec, grid: Grid, trained: str, place: torch.device) -> PlainModule:
    """The module with the checkpoint's weights, if there is one, on `place`, for inference. `trained`: the precision of training."""
    module = module.to(dtype_of(spec.precision, trained, place))
    if spec.checkpoint is not None:
        with Reader(spec.checkpoint) as reader:
            load_weights(module, reader, grid)
    return module.to(place).eval()


def without_init(model: M, variants: Mapping[str, type]) -> tuple[M, dict[str, type]]:
    """The model and its variants, changed to leave weights zero until they are read: initialising them takes longer than reading."""
    name = UninitializedWeights.__name__
    return model.model_copy(update={"init": f"{VARIANT}{name}"}), {**variants, name: UninitializedWeights}


def dtype_of(requested: str | None, trained: str, place: torch.device) -> torch.dtype:
    """The dtype to compute in on `place`. Raises a Mistake if the requested precision has no kernels there."""
    if requested == "fp16" and place.type == "cpu":
        raise Mistake("precision = 'fp16' needs a GPU, a CPU has few kernels for it → use 'fp32' or 'bf16'")
    if requested is None and trained == "fp16" and place.type == "cpu":
        return torch.float32
    return PRECISIONS[requested or trained]
