"""A run's model, read from one of its checkpoints, ready to write: on this rank's device, in the precision asked for."""

from dataclasses import dataclass
from pathlib import Path

import torch

from models import gpt
from models.config import GPT, VARIANT
from models.inference.decoder import Decoder
from models.inference.driver import DriverDecoder, DriverScorer, run_worker
from models.inference.scoring import TokenScorer
from models.init import UninitializedWeights
from parallel.checkpoint.reader import Reader, load_weights
from parallel.distributed import device
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import PlainModule
from research.config import serialization
from research.config.experiment_folder import load_variants
from research.tracking.run_folder import RunFolder

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNDRAWN = {UninitializedWeights.__name__: UninitializedWeights}
"""The variant that `undrawn` names."""


@dataclass(frozen=True)
class DecoderSpec:
    """What is restored, and for how much at once. The same on every rank; it travels to other processes."""

    run: Path
    """The run's folder."""
    checkpoint: Path
    precision: str | None = None
    """fp32, bf16 or fp16; None: what the run was trained in, but fp32 for fp16 on a CPU, which has few kernels for it."""
    slots: int = 1
    """Texts at once."""
    context: int = 1
    """Tokens of each, prompt included."""

    def on(self, grid: Grid) -> Decoder:
        """This rank's decoder; where there are other tensor ranks, the first one's leads them."""
        return decoder_of(self, grid)

    def follow(self, grid: Grid) -> None:
        """A tensor rank > 0, until the first lets go."""
        run_worker(self.on(grid))


@dataclass(frozen=True)
class ScorerSpec:
    """What is restored to score texts. The same on every rank; it travels to other processes."""

    run: Path
    checkpoint: Path
    precision: str | None = None
    """As Plan's."""

    def on(self, grid: Grid) -> TokenScorer:
        """This rank's; where there are other tensor ranks, the first one's leads them."""
        model = GPT(**serialization.load(RunFolder(self.run).config).model.model_dump())
        kind = DriverScorer if grid.tensor > 1 and grid.rank == 0 else TokenScorer
        return kind(restored(DecoderSpec(self.run, self.checkpoint, self.precision), grid), model, grid)

    def follow(self, grid: Grid) -> None:
        """A tensor rank > 0, until the first lets go."""
        run_worker(self.on(grid))


def restored(plan: DecoderSpec, grid: Grid, place: torch.device | None = None) -> PlainModule:
    """The module with the checkpoint's weights, each rank its own slices, whatever layout wrote them.

    It lies on `place` (None: this rank's device). Variants come from the run's own copy, and are executed.
    """
    folder, place = RunFolder(plan.run), place or device()
    experiment = serialization.load(folder.config)
    model, variants = GPT(**experiment.model.model_dump()), dict(load_variants(folder.source, experiment.model))
    if not model.init.startswith(VARIANT):  # one of the experiment's own may serve other classes of its own
        model, variants = without_init(model), variants | UNDRAWN
    module = PlainModule(gpt.layers(model, grid, experiment.seed, variants)).to(dtype_of(plan.precision, experiment.precision, place))
    with Reader(plan.checkpoint) as reader:
        load_weights(module, reader, grid)
    return module.to(place).eval()


def without_init(model: GPT) -> GPT:
    """The same model, its weights zeros until they are read: drawing them takes longer. UNDRAWN must be among its variants."""
    return model.model_copy(update={"init": f"{VARIANT}{UninitializedWeights.__name__}"})


def dtype_of(asked: str | None, trained: str, place: torch.device) -> torch.dtype:
    """The precision to write in. A Mistake where it was asked for and this device has no kernels for it."""
    if asked == "fp16" and place.type == "cpu":
        raise Mistake("precision = 'fp16' needs a GPU, a CPU has few kernels for it → use 'fp32' or 'bf16'")
    unfit = asked is None and trained == "fp16" and place.type == "cpu"
    return PRECISIONS["fp32" if unfit else asked or trained]


def decoder_of(plan: DecoderSpec, grid: Grid, place: torch.device | None = None) -> Decoder:
    """The restored model over a cache as large as planned; the leader of its tensor ranks where there are several and this is the first."""
    model = GPT(**serialization.load(RunFolder(plan.run).config).model.model_dump())
    kind = DriverDecoder if grid.tensor > 1 and grid.rank == 0 else Decoder
    return kind(restored(plan, grid, place), model, grid, plan.slots, plan.context)
