"""Runs `verify --types`: checks the types of an experiment's own model, forward and backward, on tensor degrees larger than this machine.

It is a third check beside numbers and closed forms. A gradient that is left partial, or a sum that is taken twice or not at all, is a type
error with a source line, found without a second rank (docs/layouts.md lists what types cannot see).

The model runs as one rank of a tensor group. The process group is torch's fake one, which sends nothing, so one process can be any rank of
any degree. The numbers mean nothing; the result is the types that the checker follows through the pass.
"""

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import spmd_types as spmd
import torch
import torch.distributed as dist
from spmd_types import I, R, V
from spmd_types.checker import typecheck
from torch.testing._internal.distributed.fake_pg import FakeStore

from models import architectures
from parallel.engines.engine import Loss
from parallel.engines.micro_batch import MicroBatch
from parallel.errors import Mistake
from parallel.grid import make_grid
from parallel.layers import PlainModule, unique_parameters
from parallel.slices import slice_of
from research import ROOT
from research.config import Experiment
from research.config import experiment_folder as folders
from research.tracking import format as fmt
from research.tracking.console import Console
from research.training.components import training_loss
from research.training.sampler import context_of
from research.verification.layouts import HEAD_SIZE, LENGTH, RECOMPUTES, SEQUENCES, hidden_size_of, nearest_multiple, of_fields, shrunk
from research.verification.random_batches import batch_of
from research.verification.results import conclude, row_fields
from research.verification.spmd_collectives import TypeMismatch, typed_collectives, typed_recompute
from research.verification.spmd_functions import TypeFinder
from research.verification.training import one_thread

DEGREES = (2, 4, 8, 64)
"""The tensor degrees that `verify --types` checks."""
LAYERS, BATCH = 2, 2
MODEL = f"{LAYERS} layers of its own classes, in sizes that the degree divides · pipe 1 · data 1 · no ranks: a fake process group"
TYPES = "I equal on every rank · R equal, its gradient partial · V a rank's own · P a summand"


@dataclass(frozen=True)
class TensorCase:
    """One layout of the tensor axis alone: pipe = data = 1."""

    tensor: int
    sequence: bool
    recompute: str

    def __str__(self) -> str:
        return fmt.layout(1, 1, self.tensor, sequence=self.sequence, recompute=self.recompute)


@dataclass(frozen=True)
class Fault:
    """A type error: the layer in which it occurred, the operation, the reason, and file:line."""

    layer: str
    what: str
    why: str
    source: str


@dataclass(frozen=True)
class Row:
    """The verdict on one layout, with the type error if there is one."""

    case: TensorCase
    verdict: str
    """pass or FAILED."""
    seconds: float
    fault: Fault | None = None

    def __str__(self) -> str:
        if self.fault is None:
            return f"{self.case} · {self.seconds:.1f} s"
        fault = self.fault
        return " · ".join(filter(None, [str(self.case), fault.layer, f"{fault.what}: {fault.why}", fault.source]))


def check_types(folder: Path, degrees: Sequence[int]) -> int:
    """Checks the experiment in `folder` on every tensor degree, with and without sequence parallelism, with each kind of recomputation.

    Returns 0 if it is well typed on all of them, else 1.
    """
    for degree in degrees:
        if degree < 2:
            raise Mistake(f"on parallel.tensor = {degree} every tensor has the same type → check 2 or more")

    loaded, console = folders.load(folder), Console()
    console.header([("", f"verify --types {loaded.name}"), ("model", MODEL), ("types", TYPES)])
    rows = []
    for case in (TensorCase(*values) for values in itertools.product(degrees, SEQUENCES, RECOMPUTES)):
        row = row_of(fitted(loaded.experiment, case.tensor), case, loaded.variants)
        console.header([(row.verdict, str(row))])
        rows.append(row)
    failed = sum(row.fault is not None for row in rows)
    target = ROOT / loaded.experiment.track.runs / loaded.name / "types.json"
    sentence = f"{len(rows) - failed} of {len(rows)} layouts are well typed"
    return conclude(console, target, {"rows": [row_fields(row) for row in rows]}, sentence, failed > 0)


def row_of(experiment: Experiment, case: TensorCase, variants: Mapping[str, type]) -> Row:
    """Checks one layout on its first and its last rank. At a large degree the last rank holds only padding of the vocabulary."""
    began = time.monotonic()
    faults = (fault_of(experiment, case, variants, rank) for rank in (0, case.tensor - 1))
    fault = next(filter(None, faults), None)
    return Row(case, "FAILED" if fault else "pass", time.monotonic() - began, fault)


def fitted(experiment: Experiment, degree: int) -> Experiment:
    """The experiment with its own structure and sizes that fit one tensor degree: few layers, and few kv heads if its heads are grouped.

    As many ranks share a kv head as the features of a head allow, so that `gather_shared` takes part.
    """
    small = shrunk(experiment, degree)
    model = small.model
    heads = kv_heads = degree
    if model.num_kv_heads < model.num_heads:
        fewest = max(1, min(model.num_kv_heads, degree // 2))
        kv_heads = next(k for k in range(fewest, degree + 1) if degree % k == 0 and HEAD_SIZE % (degree // k) == 0)
        heads = degree if kv_heads < degree else 2 * degree
    sizes: dict[str, Any] = {
        "num_encoder_layers": LAYERS,
        "num_layers": LAYERS,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "hidden_size": (hidden := hidden_size_of(model, heads)),
        "ffn_size": nearest_multiple(model.ffn_size / model.hidden_size * hidden, degree),
        "seq_length": (length := nearest_multiple(max(LENGTH, degree), degree)),
        "source_length": length,
    }
    return small.model_copy(update={"model": model.model_copy(update=of_fields(model, sizes))})


def fault_of(experiment: Experiment, case: TensorCase, variants: Mapping[str, Any], rank: int) -> Fault | None:
    """The first type error in a forward and backward pass on `rank` of the layout; None if there is none."""
    with fake_world(rank, case.tensor), one_thread():
        grid = make_grid(1, case.tensor, case.sequence)
        context = context_of(experiment, variants)
        module = PlainModule(architectures.layers(experiment.model, grid, experiment.seed, variants, case.recompute, context))
        loss = training_loss(experiment, grid.tensor_group, variants)
        # If several ranks share a kv head, the tensor axis is two axes, so that a type can describe the sharing ranks alone.
        sharers = max(1, grid.tensor // experiment.model.num_kv_heads)
        mesh = {"tensor": spmd.MeshAxis.of(grid.tensor // sharers, sharers), "sharers": spmd.MeshAxis.of(sharers, 1)}
        try:
            with spmd.set_current_mesh(mesh), typecheck(strict_mode="strict"), typed_collectives(), typed_recompute():
                typed_pass(experiment, module, loss)
        except TypeMismatch as mismatch:
            names = {id(part): name for name, part in module.named_modules()}
            layers = [names[id(part)] for part in mismatch.modules if names.get(id(part))]
            relative = os.path.relpath(mismatch.source) if mismatch.source else ""
            source = min(relative, mismatch.source, key=len)
            return Fault(layers[0] if layers else "", mismatch.what, mismatch.why, source)
    return None


def typed_pass(experiment: Experiment, module: PlainModule, loss_function: Loss) -> None:
    """Types the inputs and parameters, runs forward and backward, and checks that the loss is I and that every parameter got a gradient.

    A sliced parameter is V, and so is its gradient. A whole one is I: its gradient must be whole too, because nothing sums it later.
    """
    for _, parameter in unique_parameters(module):
        spmd.assert_type(parameter, I if slice_of(parameter).dim is None else V)
    batch = inputs(experiment)
    with TypeFinder() as finder:
        loss = loss_function(module(batch.inputs(module.context)), batch.labels)
        for kind in spmd.get_local_type(loss).values():
            if kind is not I:
                why = f"must be I, equal on every rank with the whole gradient, and is {kind.value}"
                raise TypeMismatch("the loss", why, at=finder.scalar_source)
        torch.autograd.backward(loss)
    for name, parameter in unique_parameters(module):
        if parameter.grad is None:
            raise TypeMismatch(name, "gets no gradient", at="")


def inputs(experiment: Experiment) -> MicroBatch:
    """A micro-batch with all that may travel beside x, the same on every rank."""
    with spmd.no_typecheck():
        batch = batch_of(experiment, 0)
        names, beside = zip(*batch.context.items(), strict=True)
        tensors = [batch.ids, *batch.labels, *beside]
        ids, *others = spmd.assert_type([tensor[:BATCH].contiguous() for tensor in tensors], R)
    labels, context = others[: len(batch.labels)], others[len(batch.labels) :]
    return MicroBatch(ids, tuple(labels), dict(zip(names, context, strict=True)))


@contextmanager
def fake_world(rank: int, size: int) -> Iterator[None]:
    """Initialises torch.distributed as `rank` of a world whose other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
