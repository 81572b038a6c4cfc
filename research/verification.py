"""Every layout's real engine against a serial run in plain torch: losses, norms, every gradient, every weight, by logical name."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from research import experiment as folders
from research import metrics, ranks
from research.config import Experiment
from research.cuts import Cut, full, pairwise, shrunk, why_not
from research.files import published
from research.report import Report
from research.verify_rank import Record, on_rank, serially, write_job

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5
"""Of losses, gradients and weights in fp32: relative 2-norm errors of whole logical parameters."""
NEGLIGIBLE = 1e-6
"""A gradient below this part of the global norm is compared relative to the global norm: its own digits are noise."""


@dataclass(frozen=True)
class Row:
    """One layout's verdict: the worst relative errors and the parameters where they occur."""

    cut: Cut
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
    report = Report()
    model = experiment.model
    shape = f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_heads} heads ({model.num_kv_heads} kv)"
    report.header([("", f"verify {loaded.name}"), ("model", f"shrunk to {shape}, vocabulary {model.vocab_size} · fp32 · {steps} steps")])
    reference = serially(experiment, steps, loaded.folder)
    report.header([("serial", f"plain torch, no DeepSpeed · loss {reference.losses[0]:.6f} → {reference.losses[-1]:.6f}"), ("", "")])
    rows = []
    for cut in cuts:
        rows.append(row_of(cut, experiment, steps, loaded.folder, reference))
        report.header([(rows[-1].verdict, line(rows[-1]))])
    return conclude(report, loaded.name, experiment, rows)


def row_of(cut: Cut, experiment: Experiment, steps: int, variants: Path, reference: Record, train: Callable[[Path], None] = on_rank) -> Row:
    """Trains on one layout and compares. `train` runs on every rank; a test passes one that has something broken."""
    why = why_not(cut, experiment)
    if why:
        return Row(cut, "cannot", why=why)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_job(folder, experiment, cut, steps, variants)
        try:
            ranks.run(train, cut.world, folder)
        except ranks.RankFailed as failure:
            return Row(cut, "FAILED", seconds=time.monotonic() - began, why=str(failure))
        found = [Record.load(folder, rank) for rank in range(cut.world)]
    return compared(cut, found, reference, time.monotonic() - began)


def compared(cut: Cut, found: list[Record], reference: Record, seconds: float) -> Row:
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


def conclude(report: Report, name: str, experiment: Experiment, rows: list[Row]) -> int:
    """verify.json, the last line, the exit code."""
    failed = [row for row in rows if row.verdict == "FAILED"]
    target = ROOT / experiment.track.runs / name
    target.mkdir(parents=True, exist_ok=True)
    verdicts = [{**asdict(row), "cut": asdict(row.cut)} for row in rows]
    with published(target / "verify.json") as temporary:
        temporary.write_text(json.dumps({"tolerance": TOLERANCE, "rows": metrics.finite(verdicts)}, indent=1, allow_nan=False))
    ran = sum(row.verdict != "cannot" for row in rows)
    report.header(
        [("", ""), ("done", f"{ran - len(failed)} of {ran} layouts agree to {TOLERANCE:g} · {os.path.relpath(target / 'verify.json')}")]
    )
    return 1 if failed else 0
