"""One forward and backward pass of a model under the type checker, as one rank of a tensor group that does not exist.

The process group is torch's fake one: nothing is sent, so one process can be any rank of any degree. The numbers mean nothing;
the types that the checker follows through the pass are the result.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import spmd_types as spmd
import torch
import torch.distributed as dist
from spmd_types import I, R, V
from spmd_types.checker import typecheck
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from models import gpt
from parallel.grid import Grid, make_grid
from parallel.layers import PlainModule, unique_parameters
from parallel.slices import slice_of
from research.config import Experiment
from research.misfit import Misfit
from research.typed_collectives import typed_collectives
from research.typed_functions import Witness
from research.typed_recompute import typed_recompute

BATCH = 2


@dataclass(frozen=True)
class TensorCut:
    """One layout of the tensor axis alone: pipe = data = 1."""

    tensor: int
    sequence: bool
    recompute: str

    def __str__(self) -> str:
        words = [f"tensor {self.tensor}"] + ["sequence"] * self.sequence
        return " · ".join(words + [f"{self.recompute} recomputation"] * (self.recompute != "none"))


@dataclass(frozen=True)
class Fault:
    """A type error: the layer it happened in, what did not fit and why, file:line."""

    layer: str
    what: str
    why: str
    source: str


def fault_of(experiment: Experiment, cut: TensorCut, variants: Mapping[str, type], rank: int) -> Fault | None:
    """The first type error in a forward and backward pass on `rank` of the layout; None where all is well typed."""
    with fake_world(rank, cut.tensor), one_thread():
        grid = make_grid(1, cut.tensor, cut.sequence)
        module = PlainModule(gpt.layers(experiment.model, grid, experiment.seed, variants, cut.recompute))
        loss_of = gpt.TokenLoss(experiment.model.vocab_size, experiment.optimizer.label_smoothing, grid.tensor_group)
        try:
            with spmd.set_current_mesh(mesh_of(experiment, grid)), typecheck(strict_mode="strict"), typed_collectives(), typed_recompute():
                typed_pass(experiment, module, loss_of)
        except Misfit as misfit:
            return _fault(misfit, module)
    return None


@contextmanager
def fake_world(rank: int, size: int) -> Iterator[None]:
    """torch.distributed as `rank` of a world in which nobody answers."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small are not worth waking a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def mesh_of(experiment: Experiment, grid: Grid) -> dict[str, spmd.MeshAxis]:
    """The tensor axis; in two where several ranks share a kv head, so that a type can say something about the sharers alone."""
    sharers = max(1, grid.tensor // experiment.model.num_kv_heads)
    return {"tensor": spmd.MeshAxis.of(grid.tensor // sharers, sharers), "sharers": spmd.MeshAxis.of(sharers, 1)}


def typed_pass(experiment: Experiment, module: PlainModule, loss_of: gpt.TokenLoss) -> None:
    """Types what goes in and every parameter, runs forward and backward, and sees that every parameter got its gradient."""
    for _, parameter in unique_parameters(module):
        spmd.assert_type(parameter, demanded(parameter))
    ids, targets, weights, samples = inputs(experiment)
    with Witness() as witness:
        loss = loss_of(module((ids, samples) if experiment.model.drops else ids), (targets, weights))
        for kind in spmd.get_local_type(loss).values():
            if kind is not I:
                why = f"must be I, equal on every rank with the whole gradient, and is {kind.value}"
                raise Misfit("the loss", why, at=witness.scalar_source)
        torch.autograd.backward(loss)
    for name, parameter in unique_parameters(module):
        if parameter.grad is None:
            raise Misfit(name, "gets no gradient", at="")


def demanded(parameter: Tensor) -> spmd.PerMeshAxisLocalSpmdType:
    """A cut parameter is V, and so is its gradient. A whole one is I: its gradient must be whole too, for nobody sums it later."""
    return I if slice_of(parameter).dim is None else V


def inputs(experiment: Experiment) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, targets, weights 'b s' and sample numbers 'b', the same on every rank."""
    model = experiment.model
    with spmd.no_typecheck():
        tokens = torch.randint(0, model.vocab_size, (BATCH, model.seq_length + 1), generator=torch.Generator().manual_seed(0))
        weights = torch.full((BATCH, model.seq_length), 1 / model.seq_length)
        ids, targets, weights, samples = spmd.assert_type([tokens[:, :-1], tokens[:, 1:], weights, torch.arange(BATCH)], R)
    return ids, targets, weights, samples


def _fault(misfit: Misfit, module: PlainModule) -> Fault:
    names = {id(part): name for name, part in module.named_modules()}
    layers = [names[id(part)] for part in misfit.modules if names.get(id(part))]
    relative = os.path.relpath(misfit.source) if misfit.source else ""
    return Fault(layers[0] if layers else "", misfit.what, misfit.why, min(relative, misfit.source, key=len))
