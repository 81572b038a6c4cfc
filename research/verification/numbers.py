"""Every layout's real engine against a serial run in plain torch: losses, norms, every gradient, every weight, by logical name."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from research import ROOT
from research.cluster import forked_ranks
from research.config import Experiment
from research.config import experiment_folder as folders
from research.tracking import metrics
from research.tracking.console import Console
from research.verification.layouts import LayoutCase, full, pairwise, shrunk, why_not
from research.verification.results import conclude
from research.verification.training import TrainingRecord, on_rank, reference_run, write_job

TOLERANCE = 1e-5
"""Of losses, gradients and weights in fp32: relative 2-norm errors of whole logical parameters."""
NEGLIGIBLE = 1e-6
"""A gradient below this part of the global norm is compared relative to the global norm: its own digits are noise."""


@dataclass(frozen=True)
class Row:
    """One layout's verdict: the worst relative errors and the parameters where they occur."""

    cut: LayoutCase
    verdict: str
    loss: float = 0.0
    norm: float = 0.0
    gradient: float = 0.0
    gradient_at: str = ""
    weight: float = 0.0
    weight_at: str = ""
    seconds: float = 0.0
    why: str = ""


def verify(folder: Path, world: int, everything: bool, steps: int) -> int:
    """0 where every layout that can be agrees with the serial reference, else 1."""
    loaded = folders.load(folder)
    largest = 8 if everything else world
    experiment = shrunk(loaded.experiment, largest)
    cuts = [cut for w in (1, 2, 4, 8) if w <= largest for cut in (full(w) if everything else pairwise(w) if w in (2, world) else [])]
    report = Console()
    model = experiment.model
    shape = f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_heads} heads ({model.num_kv_heads} kv)"
    report.header([("", f"verify {loaded.name}"), ("model", f"shrunk to {shape}, vocabulary {model.vocab_size} · fp32 · {steps} steps")])
    reference = reference_run(experiment, steps, loaded.folder)
    report.header([("serial", f"plain torch, no DeepSpeed · loss {reference.losses[0]:.6f} → {reference.losses[-1]:.6f}"), ("", "")])
    rows = []
    for cut in cuts:
        rows.append(row_of(cut, experiment, steps, loaded.folder, reference))
        report.header([(rows[-1].verdict, line(rows[-1]))])
    failed, ran = sum(row.verdict == "FAILED" for row in rows), sum(row.verdict != "cannot" for row in rows)
    results = {"tolerance": TOLERANCE, "rows": [{**asdict(row), "cut": asdict(row.cut)} for row in rows]}
    target = ROOT / experiment.track.runs / loaded.name / "verify.json"
    return conclude(report, target, results, f"{ran - failed} of {ran} layouts agree to {TOLERANCE:g}", failed > 0)


def row_of(
    cut: LayoutCase, experiment: Experiment, steps: int, variants: Path, reference: TrainingRecord, train: Callable[[Path], None] = on_rank
) -> Row:
    """Trains on one layout and compares. `train` runs on every rank; a test passes one that has something broken."""
    why = why_not(cut, experiment)
    if why:
        return Row(cut, "cannot", why=why)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_job(folder, experiment, cut, steps, variants)
        try:
            forked_ranks.run(train, cut.world, folder)
        except forked_ranks.RankFailed as failure:
            return Row(cut, "FAILED", seconds=time.monotonic() - began, why=str(failure))
        found = [TrainingRecord.load(folder, rank) for rank in range(cut.world)]
    return compared(cut, found, reference, time.monotonic() - began)


def compared(cut: LayoutCase, found: list[TrainingRecord], reference: TrainingRecord, seconds: float) -> Row:
    """The worst errors over all ranks. A parameter that nobody holds, or that is not finite, is infinitely wrong."""
    loss = max(metrics.relative(a, b) for record in found for a, b in zip(record.losses, reference.losses, strict=True))
    norm = max(metrics.relative(a, b) for record in found for a, b in zip(record.norms, reference.norms, strict=True))
    gradient, gradient_at = worst([record.gradients for record in found], reference.gradients)
    weight, weight_at = worst([record.weights for record in found], reference.weights)
    passed = max(loss, norm, gradient, weight) <= TOLERANCE
    return Row(cut, "pass" if passed else "FAILED", loss, norm, gradient, gradient_at, weight, weight_at, seconds)


def worst(found: list[dict[str, Tensor]], truth: dict[str, Tensor]) -> tuple[float, str]:
    """(largest ‖a − b‖/‖b‖ over ranks and parameters, its name)."""
    whole = torch.stack([tensor.norm() for tensor in truth.values()]).norm()
    errors = dict.fromkeys(truth, torch.inf)
    for name, b in truth.items():
        holders = [tensors[name] for tensors in found if name in tensors]
        scale = b.norm() if b.norm() >= NEGLIGIBLE * whole else whole
        if holders:
            errors[name] = max(float((a - b).norm() / scale) for a in holders)
            errors[name] = errors[name] if errors[name] == errors[name] else torch.inf
    name = max(errors, key=lambda key: errors[key])
    return errors[name], name


def line(row: Row) -> str:
    """A row as a person reads it."""
    if row.why:
        return f"{row.cut} · {row.why}"
    scalars = f"loss {row.loss:.0e} · norm {row.norm:.0e}"
    tensors = f"gradient {row.gradient:.0e} ({row.gradient_at}) · weight {row.weight:.0e} ({row.weight_at})"
    return f"{row.cut} · {scalars} · {tensors} · {row.seconds:.1f} s"
