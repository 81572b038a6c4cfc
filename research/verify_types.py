"""`verify --types`: the types of an experiment's own model, forward and backward, on tensor degrees that no machine here has.

A third witness beside numbers and closed forms. A gradient left partial, a sum taken twice or not at all is a type error with a
source line, found without a second rank (docs/layouts.md says what types cannot see).
"""

import importlib.util
import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.errors import Mistake
from research import experiment as folders
from research.config import Experiment
from research.cuts import HEAD_SIZE, LENGTH, RECOMPUTES, SEQUENCES, shrunk
from research.files import published
from research.report import Report

if TYPE_CHECKING:
    from research.typed_pass import Fault, TensorCut

ROOT = Path(__file__).resolve().parent.parent
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
    if importlib.util.find_spec("spmd_types") is None:
        raise Mistake("verify --types needs the package spmd_types → pip install -r requirements-dev.txt")
    for degree in degrees:
        if degree < 2:
            raise Mistake(f"on parallel.tensor = {degree} every tensor has the same type → check 2 or more")
    from research.typed_pass import TensorCut

    loaded, report = folders.load(folder), Report()
    report.header([("", f"verify --types {loaded.name}"), ("model", MODEL), ("types", TYPES)])
    rows = []
    for cut in (TensorCut(*cut) for cut in itertools.product(degrees, SEQUENCES, RECOMPUTES)):
        rows.append(row_of(fitted(loaded.experiment, cut.tensor), cut, loaded.variants))
        report.header([(rows[-1].verdict, line(rows[-1]))])
    return _conclude(report, loaded.name, loaded.experiment, rows)


def row_of(experiment: Experiment, cut: "TensorCut", variants: Mapping[str, type]) -> Row:
    """One layout on its first rank and on its last, which has no real row of the vocabulary where the degree is large."""
    from research.typed_pass import fault_of

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
        "ffn_size": _multiple(model.ffn_size / model.hidden_size * heads * HEAD_SIZE, degree),
        "seq_length": _multiple(max(LENGTH, degree), degree),
    }
    return small.model_copy(update={"model": model.model_copy(update=sizes)})


def _multiple(size: float, unit: int) -> int:
    return max(1, round(size / unit)) * unit


def line(row: Row) -> str:
    """A row as a person reads it."""
    if row.fault is None:
        return f"{row.cut} · {row.seconds:.1f} s"
    fault = row.fault
    return " · ".join(filter(None, [str(row.cut), fault.layer, f"{fault.what}: {fault.why}", fault.source]))


def _conclude(report: Report, name: str, experiment: Experiment, rows: list[Row]) -> int:
    """types.json, the last line, the exit code."""
    failed = [row for row in rows if row.fault]
    target = ROOT / experiment.track.runs / name
    target.mkdir(parents=True, exist_ok=True)
    with published(target / "types.json") as temporary:
        temporary.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1))
    written = os.path.relpath(target / "types.json")
    report.header([("", ""), ("done", f"{len(rows) - len(failed)} of {len(rows)} layouts are well typed · {written}")])
    return 1 if failed else 0
