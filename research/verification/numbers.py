"""Compares the training of every layout's real engine with a serial reference run in plain torch.

Compared are the losses, the gradient norms, every gradient and every weight, by logical name.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from research.verification.results import conclude, row_fields
from research.verification.training import TrainingRecord, on_rank, reference_run, write_job

TOLERANCE = 1e-5
"""Largest allowed error of losses, norms, gradients and weights in fp32. The error of a tensor is the relative 2-norm error of the whole
logical parameter."""
NEGLIGIBLE = 1e-6
"""A gradient smaller than this fraction of the global norm is compared relative to the global norm: its own digits are noise."""


@dataclass(frozen=True)
class Row:
    """The verdict on one layout, with the largest relative errors and the parameters where they occur."""

    case: LayoutCase
    verdict: str
    """pass, FAILED or cannot."""
    loss: float = 0.0
    norm: float = 0.0
    gradient: float = 0.0
    gradient_at: str = ""
    weight: float = 0.0
    weight_at: str = ""
    seconds: float = 0.0
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return f"{self.case} · {self.why}"
        scalars = f"loss {self.loss:.0e} · norm {self.norm:.0e}"
        tensors = f"gradient {self.gradient:.0e} ({self.gradient_at}) · weight {self.weight:.0e} ({self.weight_at})"
        return f"{self.case} · {scalars} · {tensors} · {self.seconds:.1f} s"


def verify(folder: Path, world: int, everything: bool, steps: int) -> int:
    """Verifies the experiment in `folder` on layouts of 2 and of `world` ranks, or on all layouts of up to 8 ranks with `everything`.

    Returns 0 if every possible layout agrees with the serial reference, else 1.
    """
    loaded = folders.load(folder)
    largest = 8 if everything else world
    experiment = shrunk(loaded.experiment, largest)
    cases = [case for w in (1, 2, 4, 8) if w <= largest for case in (full(w) if everything else pairwise(w) if w in (2, world) else [])]

    # The reference: one process, no DeepSpeed.
    console = Console()
    model = experiment.model
    shape = f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_heads} heads ({model.num_kv_heads} kv)"
    console.header([("", f"verify {loaded.name}"), ("model", f"shrunk to {shape}, vocabulary {model.vocab_size} · fp32 · {steps} steps")])
    reference = reference_run(experiment, steps, loaded.folder)
    console.header([("serial", f"plain torch, no DeepSpeed · loss {reference.losses[0]:.6f} → {reference.losses[-1]:.6f}"), ("", "")])

    rows = []
    for case in cases:
        row = row_of(case, experiment, steps, loaded.folder, reference)
        console.header([(row.verdict, str(row))])
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
            forked_ranks.run(train, case.world, folder)
        except forked_ranks.RankFailed as failure:
            return Row(case, "FAILED", seconds=time.monotonic() - began, why=str(failure))
        records = [TrainingRecord.load(folder, rank) for rank in range(case.world)]
    loss = max(metrics.relative(a, b) for record in records for a, b in zip(record.losses, reference.losses, strict=True))
    norm = max(metrics.relative(a, b) for record in records for a, b in zip(record.norms, reference.norms, strict=True))
    gradient, gradient_at = worst([record.gradients for record in records], reference.gradients)
    weight, weight_at = worst([record.weights for record in records], reference.weights)
    verdict = "pass" if max(loss, norm, gradient, weight) <= TOLERANCE else "FAILED"
    return Row(case, verdict, loss, norm, gradient, gradient_at, weight, weight_at, time.monotonic() - began)


def worst(by_rank: list[dict[str, Tensor]], reference: dict[str, Tensor]) -> tuple[float, str]:
    """(largest ‖a − b‖/‖b‖ over ranks and parameters, the parameter's name).

    The error of a parameter that no rank holds, or that is not finite, is infinite.
    """
    global_norm = torch.stack([tensor.norm() for tensor in reference.values()]).norm()
    errors = dict.fromkeys(reference, torch.inf)
    for name, b in reference.items():
        copies = [tensors[name] for tensors in by_rank if name in tensors]
        scale = b.norm() if b.norm() >= NEGLIGIBLE * global_norm else global_norm
        if copies:
            errors[name] = max(float((a - b).norm() / scale) for a in copies)
            errors[name] = errors[name] if errors[name] == errors[name] else torch.inf  # NaN
    name = max(errors, key=lambda key: errors[key])
    return errors[name], name
