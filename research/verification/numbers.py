"""Compares the training of every layout's real engine with a serial reference run in plain torch.

Compared are the outputs of every layer, the losses, the gradient norms, every gradient and every weight, by logical name.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from models.encoder_config import T5, AnyModel
from parallel.grid import Grid
from research import ROOT
from research.cluster import forked_ranks
from research.config import Experiment
from research.config import experiment_folder as folders
from research.tracking import metrics
from research.tracking.console import Console
from research.verification.hangs import describe_hang, hung_ranks
from research.verification.layouts import LayoutCase, full, pairwise, shrunk, why_not
from research.verification.results import conclude, row_fields
from research.verification.training import HANG_SECONDS, TrainingRecord, binding_clip, on_rank, one_thread, reference_run, write_job

TOLERANCE = 1e-5
"""Largest allowed error of outputs, losses, norms, gradients and weights in fp32. The error of a tensor is the relative 2-norm error of the
whole logical tensor."""
NEGLIGIBLE = 1e-6
"""A gradient smaller than this fraction of the global norm is compared relative to the global norm: its own digits are noise."""
PATIENCE = 300.0
"""Seconds for a whole layout. Ranks that make no progress end much sooner (research/verification/hangs.py)."""


LOGITS = ("head", "head_bias", "outputs")
"""The layers whose output is cut by vocabulary rows."""


@dataclass(frozen=True)
class Row:
    """The verdict on one layout, with the largest relative errors and the layers and parameters where they occur."""

    case: LayoutCase
    verdict: str
    """pass, FAILED or cannot."""
    loss: float = 0.0
    norm: float = 0.0
    output: float = 0.0
    output_at: str = ""
    gradient: float = 0.0
    gradient_at: str = ""
    weight: float = 0.0
    weight_at: str = ""
    first: str = ""
    """The first thing that differs, in the order in which training computes: where to look. Empty if nothing does."""
    seconds: float = 0.0
    why: str = ""
    """Why there is nothing to compare."""
    stacks: dict[int, list[str]] = field(default_factory=dict)
    """The stack of each rank of a layout that hangs, innermost frame last."""

    def __str__(self) -> str:
        if self.why:
            return f"{self.case} · {self.why}"
        scalars = f"loss {self.loss:.0e} · norm {self.norm:.0e} · output {self.output:.0e} ({self.output_at})"
        tensors = f"gradient {self.gradient:.0e} ({self.gradient_at}) · weight {self.weight:.0e} ({self.weight_at})"
        first = f"\n{self.first}" if self.first else ""
        return f"{self.case} · {scalars} · {tensors} · {self.seconds:.1f} s{first}"


def verify(folder: Path, world: int, everything: bool, steps: int) -> int:
    """Verifies the experiment in `folder` on layouts of 2 and of `world` ranks, or on all layouts of up to 8 ranks with `everything`.

    Returns 0 if every possible layout agrees with the serial reference, else 1.
    """
    loaded = folders.load(folder)
    largest = 8 if everything else world
    with one_thread():
        experiment = binding_clip(shrunk(loaded.experiment, largest, steps), steps, loaded.folder)
        reference = reference_run(experiment, steps, loaded.folder)
    cases = [case for w in (1, 2, 4, 8) if w <= largest for case in (full(w) if everything else pairwise(w) if w in (2, world) else [])]

    # The reference: one process, no DeepSpeed.
    console = Console()
    model = experiment.model
    layers = f"{model.num_encoder_layers} + {model.num_layers}" if isinstance(model, T5) else model.num_layers
    shape = f"{layers} layers, hidden {model.hidden_size}, {model.num_heads} heads ({model.num_kv_heads} kv)"
    console.header([("", f"verify {loaded.name}"), ("model", f"shrunk to {shape}, vocabulary {model.vocab_size} · fp32 · {steps} steps")])
    console.header([("serial", f"plain torch, no DeepSpeed · loss {reference.losses[0]:.6f} → {reference.losses[-1]:.6f}"), ("", "")])

    rows = []
    for case in cases:
        row = row_of(case, experiment, steps, loaded.folder, reference)
        first, *more = str(row).splitlines()
        console.header([(row.verdict, first), *((" ", line) for line in more)])
        rows.append(row)
    failed, ran = sum(row.verdict == "FAILED" for row in rows), sum(row.verdict != "cannot" for row in rows)
    results = {"tolerance": TOLERANCE, "rows": [row_fields(row) for row in rows]}
    target = ROOT / experiment.track.runs / loaded.name / "verify.json"
    return conclude(console, target, results, f"{ran - failed} of {ran} layouts agree to {TOLERANCE:g}", failed > 0)


def row_of(
    case: LayoutCase, experiment: Experiment, steps: int, variants: Path, reference: TrainingRecord, train: Callable[[Path], None] = on_rank
) -> Row:
    """Trains on one layout and compares with the reference. Every rank runs `train`; tests pass a function in which something is broken."""
    why = why_not(case, experiment)
    if why:
        return Row(case, "cannot", why=why)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_job(folder, experiment, case, steps, variants)
        try:
            forked_ranks.run(train, case.world, folder, PATIENCE)
        except forked_ranks.RankFailed as failure:
            hung = hung_ranks(folder, case.world)
            why = describe_hang(HANG_SECONDS, hung, case.world) if hung else str(failure)
            stacks = {rank: heartbeat.stack for rank, heartbeat in hung.items()}
            return Row(case, "FAILED", seconds=time.monotonic() - began, why=why, stacks=stacks)
        records = [TrainingRecord.load(folder, rank) for rank in range(case.world)]
    return compared(case, experiment, records, reference, time.monotonic() - began)


def compared(case: LayoutCase, experiment: Experiment, records: list[TrainingRecord], reference: TrainingRecord, seconds: float) -> Row:
    """The row of a layout from what its ranks recorded."""
    losses = [max(metrics.relative(record.losses[i], loss) for record in records) for i, loss in enumerate(reference.losses)]
    norms = [max(metrics.relative(record.norms[i], norm) for record in records) for i, norm in enumerate(reference.norms)]
    outputs = errors_of(whole_outputs(records, case, experiment), reference.outputs)
    gradients = errors_of([record.gradients for record in records], reference.gradients)
    weights = errors_of([record.weights for record in records], reference.weights)
    tables = [worst(errors) for errors in (outputs, gradients, weights)]
    passes = max(*losses, *norms, *(error for error, _ in tables)) <= TOLERANCE
    first = "" if passes else first_difference(outputs, losses, gradients, norms, weights)
    (output, output_at), (gradient, gradient_at), (weight, weight_at) = tables
    errors = (max(losses), max(norms), output, output_at, gradient, gradient_at, weight, weight_at)
    return Row(case, "pass" if passes else "FAILED", *errors, first, seconds)


def first_difference(
    outputs: dict[str, float], losses: list[float], gradients: dict[str, float], norms: list[float], weights: dict[str, float]
) -> str:
    """What differs first, in the order of the computation: by step, the outputs of the layers, the loss, the gradients, the norm; weights.

    Gradients are taken in the order of the backward pass, the last layer's first.
    """
    for step in range(len(losses)):
        forward = [(f"the output of {name}", error) for name, error in outputs.items()]
        backward = [(f"the gradient of {name}", error) for name, error in reversed(gradients.items())]
        own = [(what.removesuffix(f"@{step}"), error) for what, error in (*forward, *backward) if what.endswith(f"@{step}")]
        count = sum(what.startswith("the output") for what, _ in own)
        in_order = [*own[:count], ("the loss", losses[step]), *own[count:], ("the gradient norm", norms[step])]
        for what, error in in_order:
            if not error <= TOLERANCE:
                after = f", after the update of step {step}" if step and what.startswith("the output") else ""
                return f"first different: {what} in step {step + 1} (by {error:.0e}){after}"
    name = next(name for name, error in weights.items() if not error <= TOLERANCE)
    return f"first different: the weight {name} after the last update (by {weights[name]:.0e}); everything before it is equal"


def whole_outputs(records: list[TrainingRecord], case: LayoutCase, experiment: Experiment) -> list[dict[str, Tensor]]:
    """Each layer's output for the whole batch, by layer@step, joined from the ranks. One table for each copy that tensor ranks hold.

    A layer's output is cut over data ranks by samples. Over tensor ranks the logits are cut by vocabulary rows, other outputs by
    positions under sequence parallelism (of a T5 the source and the target each by itself), and are otherwise equal. An output that a rank
    lacks, or that has another shape there, is in no table.
    """
    by_place: dict[tuple[str, int], list[Tensor]] = {}
    for rank, record in enumerate(records):
        place = Grid(case.pipe, case.data, case.tensor, rank)
        for name, output in record.outputs.items():
            by_place.setdefault((name, place.data_rank), []).append(output)  # in the order of tensor ranks
    tables: list[dict[str, Tensor]] = [{} for _ in range(case.tensor)]
    for name in dict.fromkeys(name for name, _ in by_place):
        by_data_rank = [by_place.get((name, data_rank), []) for data_rank in range(case.data)]
        shapes = [piece.shape for pieces in by_data_rank for piece in pieces]
        if len(shapes) < case.data * case.tensor or len(set(shapes)) > 1:
            continue
        if name.partition("@")[0] in LOGITS:
            whole = [torch.cat(pieces, dim=-1)[..., : experiment.model.vocab_size] for pieces in by_data_rank]
            by_data_rank = [[logits] * case.tensor for logits in whole]
        elif case.sequence and len(shapes[0]) == 3:
            by_data_rank = [[joined_positions(pieces, experiment.model)] * case.tensor for pieces in by_data_rank]
        for copy, table in enumerate(tables):
            table[name] = torch.cat([pieces[copy] for pieces in by_data_rank])
    return tables


def joined_positions(pieces: list[Tensor], model: AnyModel) -> Tensor:
    """The positions of all tensor ranks, 'b s/tp d' each -> 'b s d'. A T5's rank has its part of the source, then of the target."""
    length = sum(piece.shape[1] for piece in pieces)
    if not isinstance(model, T5) or length != model.source_length + model.seq_length:
        return torch.cat(pieces, dim=1)
    border = model.source_length // len(pieces)
    return torch.cat([piece[:, :border] for piece in pieces] + [piece[:, border:] for piece in pieces], dim=1)


def errors_of(by_rank: list[dict[str, Tensor]], reference: dict[str, Tensor]) -> dict[str, float]:
    """name -> largest ‖a − b‖/‖b‖ over ranks. It is infinite if no rank holds the tensor, or one holds NaN or another shape."""
    global_norm = torch.stack([tensor.norm() for tensor in reference.values()]).norm()
    errors = dict.fromkeys(reference, torch.inf)
    for name, b in reference.items():
        copies = [tensors[name] for tensors in by_rank if name in tensors]
        scale = b.norm() if b.norm() >= NEGLIGIBLE * global_norm else global_norm
        if copies:
            errors[name] = max(float((a - b).norm() / scale) if a.shape == b.shape else torch.inf for a in copies)
            errors[name] = errors[name] if errors[name] == errors[name] else torch.inf  # NaN
    return errors


def worst(errors: dict[str, float]) -> tuple[float, str]:
    """(the largest error, its name)."""
    name = max(errors, key=lambda key: errors[key])
    return errors[name], name
