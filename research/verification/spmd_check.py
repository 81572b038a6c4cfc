"""One forward and backward pass of a model under the type checker, as one rank of a tensor group that does not exist.

The process group is torch's fake one: nothing is sent, so one process can be any rank of any degree. The numbers mean nothing;
the types that the checker follows through the pass are the result.
"""
# MERGED-DOC """`verify --types`: the types of an experiment's own model, forward and backward, on tensor degrees that no machine here has.
# MERGED-DOC
# MERGED-DOC A third witness beside numbers and closed forms. A gradient left partial, a sum taken twice or not at all is a type error with a
# MERGED-DOC source line, found without a second rank (docs/layouts.md says what types cannot see).
# MERGED-DOC """

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import spmd_types as spmd
import torch
import torch.distributed as dist
from spmd_types import I, R, V
from spmd_types.checker import typecheck
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from models import gpt
from parallel.errors import Mistake
from parallel.grid import Grid, make_grid
from parallel.layers import PlainModule, unique_parameters
from parallel.slices import slice_of
from research import ROOT
from research.config import Experiment
from research.config import experiment_folder as folders
from research.tracking.console import Console
from research.verification.layouts import HEAD_SIZE, LENGTH, RECOMPUTES, SEQUENCES, nearest_multiple, shrunk
from research.verification.results import conclude
from research.verification.spmd_collectives import TypeMismatch, typed_collectives, typed_recompute
from research.verification.spmd_functions import TypeFinder

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
        except TypeMismatch as misfit:
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
    with TypeFinder() as witness:
        loss = loss_of(module((ids, samples) if experiment.model.drops else ids), (targets, weights))
        for kind in spmd.get_local_type(loss).values():
            if kind is not I:
                why = f"must be I, equal on every rank with the whole gradient, and is {kind.value}"
                raise TypeMismatch("the loss", why, at=witness.scalar_source)
        torch.autograd.backward(loss)
    for name, parameter in unique_parameters(module):
        if parameter.grad is None:
            raise TypeMismatch(name, "gets no gradient", at="")


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


def _fault(misfit: TypeMismatch, module: PlainModule) -> Fault:
    names = {id(part): name for name, part in module.named_modules()}
    layers = [names[id(part)] for part in misfit.modules if names.get(id(part))]
    relative = os.path.relpath(misfit.source) if misfit.source else ""
    return Fault(layers[0] if layers else "", misfit.what, misfit.why, min(relative, misfit.source, key=len))


DEGREES = (2, 4, 8, 64)
"""The tensor degrees that `verify --types` checks."""
LAYERS = 2
MODEL = f"{LAYERS} layers of its own classes, in sizes that the degree divides · pipe 1 · data 1 · no ranks: a fake process group"
TYPES = "I equal on every rank · R equal, its gradient partial · V a rank's own · P a summand"


@dataclass(frozen=True)
class Row:
    """One layout's verdict; of a type error the layer, what did not fit, why, and file:line."""

    cut: "TensorCut"
    verdict: str
    seconds: float
    fault: "Fault | None" = None


def check_types(folder: Path, degrees: Sequence[int]) -> int:
    """0 where the experiment in `folder` is well typed on every tensor degree, with and without sequence parallelism, else 1."""
    for degree in degrees:
        if degree < 2:
            raise Mistake(f"on parallel.tensor = {degree} every tensor has the same type → check 2 or more")

    loaded, report = folders.load(folder), Console()
    report.header([("", f"verify --types {loaded.name}"), ("model", MODEL), ("types", TYPES)])
    rows = []
    for cut in (TensorCut(*cut) for cut in itertools.product(degrees, SEQUENCES, RECOMPUTES)):
        rows.append(row_of(fitted(loaded.experiment, cut.tensor), cut, loaded.variants))
        report.header([(rows[-1].verdict, line(rows[-1]))])
    failed = sum(row.fault is not None for row in rows)
    target = ROOT / loaded.experiment.track.runs / loaded.name / "types.json"
    sentence = f"{len(rows) - failed} of {len(rows)} layouts are well typed"
    return conclude(report, target, {"rows": [asdict(row) for row in rows]}, sentence, failed > 0)


def row_of(experiment: Experiment, cut: "TensorCut", variants: Mapping[str, type]) -> Row:
    """One layout on its first rank and on its last, which has no real row of the vocabulary where the degree is large."""

    began = time.monotonic()
    faults = (fault_of(experiment, cut, variants, rank) for rank in (0, cut.tensor - 1))
    fault = next(filter(None, faults), None)
    return Row(cut, "FAILED" if fault else "pass", time.monotonic() - began, fault)


def fitted(experiment: Experiment, degree: int) -> Experiment:
    """The experiment with its structure and sizes that fit one tensor degree: few layers, few kv heads where they are few.

    Grouped heads are shared by as many ranks as a head's features allow, so that `gather_shared` takes part.
    """
    small = shrunk(experiment, degree)
    model = small.model
    heads = kv_heads = degree
    if model.num_kv_heads < model.num_heads:
        kv_heads = next(k for k in range(model.num_kv_heads, degree + 1) if degree % k == 0 and HEAD_SIZE % (degree // k) == 0)
        heads = degree if kv_heads < degree else 2 * degree
    sizes: dict[str, Any] = {
        "num_layers": LAYERS,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "hidden_size": heads * HEAD_SIZE,
        "ffn_size": nearest_multiple(model.ffn_size / model.hidden_size * heads * HEAD_SIZE, degree),
        "seq_length": nearest_multiple(max(LENGTH, degree), degree),
    }
    return small.model_copy(update={"model": model.model_copy(update=sizes)})


def line(row: Row) -> str:
    """A row as a person reads it."""
    if row.fault is None:
        return f"{row.cut} · {row.seconds:.1f} s"
    fault = row.fault
    return " · ".join(filter(None, [str(row.cut), fault.layer, f"{fault.what}: {fault.why}", fault.source]))
