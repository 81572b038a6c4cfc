"""What every layout communicates, counted on its real engine, beside the closed forms: calls and bytes by axis and layer."""
# MERGED-DOC """What `verify --ledger` prints and writes: a heading a layout, a line a kind of collective, ledger.json."""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from models import gpt
from models.estimates import communication
from parallel.grid import Grid, make_grid
from parallel.layers import stage_bounds
from parallel.ledger import Entry, Ledger, bookkeeping, first_difference
from parallel.slices import slice_of
from parallel.traffic import Call, data_calls, pipe_calls
from research import ROOT
from research.cluster import forked_ranks
from research.config import Experiment
from research.config import experiment_folder as folders
from research.config.experiment_folder import load_variants
from research.tracking.console import Console
from research.verification.layouts import LayoutCase, pairwise, shrunk, why_not
from research.verification.results import conclude
from research.verification.training import engine_of, loss_of, read_job, share_of, write_job

STEPS = 2
"""The second is counted: in the first, DeepSpeed's stages tell each other shapes."""
PATIENCE = 120.0
"""Seconds after which ranks that have not finished are taken to wait for each other in vain."""


class Kind(NamedTuple):
    """What makes collectives the same line of the table."""

    axis: str
    layer: str
    direction: str
    operation: str
    elements: int
    ranks: int


@dataclass(frozen=True)
class Line:
    """One kind of collective of one rank: what the closed form says and what was counted, in one step."""

    kind: Kind
    formula: str
    expected: int
    found: int


@dataclass
class Row:
    """One layout's verdict: every line of every rank, or why there is none."""

    cut: LayoutCase
    verdict: str
    lines: dict[int, list[Line]] = field(default_factory=dict)
    why: str = ""
    seconds: float = 0.0
    sent: dict[str, float] = field(default_factory=dict)
    """Bytes that rank 0 sends in a step, by axis, on a ring."""
    counted: bool = True
    """Whether there is a closed form to compare with."""


def row_of(cut: LayoutCase, experiment: Experiment, variants: Path, train: Callable | None = None, patience: float = PATIENCE) -> Row:
    """Trains two steps on one layout and compares the second. `train` runs on every rank; a test passes one with something broken."""
    why = why_not(cut, experiment)
    if why:
        return Row(cut, "cannot", why=why)
    began, failure = time.monotonic(), ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_job(folder, experiment, cut, STEPS, variants)
        try:
            forked_ranks.run(train or on_rank, cut.world, folder, patience)
        except forked_ranks.RankFailed as error:
            failure = str(error)
        found = [read(folder, rank) for rank in range(cut.world)]
        shapes = [] if failure else [json.loads((folder / f"shapes_{rank}.json").read_text()) for rank in range(cut.world)]
    difference = first_difference([[entry for step in steps for entry in step] for steps in found])
    if failure or difference:
        return Row(cut, "FAILED", why=difference or failure, seconds=time.monotonic() - began)
    return compared(cut, experiment, [steps[-1] for steps in found], shapes, variants, time.monotonic() - began)


def on_rank(folder: Path) -> None:
    """Trains the folder's job and writes down every collective before it is issued, a line each. Collective."""
    experiment, cut, steps, variants = read_job(folder)
    grid = make_grid(cut.pipe, cut.tensor, cut.sequence)
    with (folder / f"ledger_{grid.rank}.jsonl").open("w", buffering=1) as file:  # a line is with the system when it is written
        book = Ledger(grid, lambda entry: print(json.dumps(entry), file=file))
        engine = engine_of(experiment, cut, grid, variants, book.within("loss", loss_of(experiment, grid)))
        engine.module.watch(book.within)
        for step in range(steps):
            print(json.dumps("step"), file=file)
            book.between_steps()
            with book:
                engine.train_batch(share_of(experiment, step, grid, cut), experiment.optimizer.lr)
    shapes = [slice_of(parameter).local_shape(grid.tensor) for parameter in engine.parameters.values()]
    (folder / f"shapes_{grid.rank}.json").write_text(json.dumps(shapes))


def read(folder: Path, rank: int) -> list[list[Entry]]:
    """A rank's entries by step; none where it wrote none. A line torn by a kill is left out."""
    path = folder / f"ledger_{rank}.jsonl"
    steps: list[list[Entry]] = []
    for line in path.read_text().split("\n")[:-1] if path.is_file() else []:
        value = json.loads(line)
        if value == "step":
            steps.append([])
        else:
            entry = Entry(*value)
            steps[-1].append(entry._replace(ranks=tuple(entry.ranks)))
    return steps


def compared(
    cut: LayoutCase, experiment: Experiment, found: Sequence[Sequence[Entry]], shapes: list[list[list[int]]], variants: Path, seconds: float
) -> Row:
    """Rank by rank, the counted step beside the closed forms. With a variant's own class in the model, the tensor axis has none."""
    closed = communication.has_closed_form(experiment.model)
    lines = {}
    for rank, entries in enumerate(found):
        place = Grid(cut.pipe, cut.data, cut.tensor, rank)
        axes = ("tensor", "pipe", "data") if closed else ("pipe", "data")
        expected = [call for call in calls(experiment, cut, place, [tuple(s) for s in shapes[rank]], variants) if call.axis in axes]
        lines[rank] = beside(expected, counted(entry for entry in entries if entry.axis in axes))
    agrees = all(line.expected == line.found for by_rank in lines.values() for line in by_rank)
    tensors = [entry for entry in found[0] if not bookkeeping(entry)]
    sent = {axis: sum(entry.sent for entry in tensors if entry.axis == axis) for axis in ("tensor", "pipe", "data")}
    return Row(cut, "pass" if agrees else "FAILED", lines, seconds=seconds, sent=sent, counted=closed)


def calls(experiment: Experiment, cut: LayoutCase, place: Grid, shapes: Sequence[tuple[int, ...]], variants: Path) -> list[Call]:
    """The closed form of one rank's step."""
    model = experiment.model
    here = layer_names(experiment, cut, place, variants) | ({"loss"} if place.is_last_stage else set())
    per_pass = communication.tensor_calls(model, cut.tensor, cut.sequence, cut.recompute, cut.micro_batch)
    tensor = [replace(call, times=call.times * cut.accumulated) for call in per_pass if call.layer in here]
    activation = cut.micro_batch * model.seq_length * model.hidden_size // (cut.tensor if cut.sequence else 1)
    table = -(-model.vocab_size // cut.tensor) * model.hidden_size if model.tied else 0
    formula = "b·s·h/t" if cut.sequence else "b·s·h"
    pipe = pipe_calls(place.pipe_rank, cut.pipe, activation, formula, cut.accumulated, table)
    return [*tensor, *pipe, *data_calls(cut.zero_stage, shapes, cut.data, cut.accumulated)]


def layer_names(experiment: Experiment, cut: LayoutCase, place: Grid, variants: Path) -> set[str]:
    """The layers of a rank's stage."""
    layers = gpt.layers(experiment.model, Grid(), experiment.seed, load_variants(variants, experiment.model))
    bounds = stage_bounds(layers, cut.pipe)
    return {layer.name for layer in layers[bounds[place.pipe_rank] : bounds[place.pipe_rank + 1]]}


def counted(entries: Iterable[Entry]) -> Counter[Kind]:
    """Calls by kind, bookkeeping left out; on the data axis, where buckets split tensors as they like, all elements of an operation."""
    found: Counter[Kind] = Counter()
    totals: Counter[Kind] = Counter()
    for entry in entries:
        if bookkeeping(entry):
            continue
        if entry.axis == "data":
            totals[Kind("data", "", "", entry.operation, 0, len(entry.ranks))] += entry.elements
        else:
            layer, direction = (entry.layer, entry.direction) if entry.axis == "tensor" else ("", "")
            found[Kind(entry.axis, layer, direction, entry.operation, entry.elements, len(entry.ranks))] += 1
    for kind, elements in totals.items():
        found[kind._replace(elements=elements)] = 1
    return found


def beside(expected: Iterable[Call], found: Counter[Kind]) -> list[Line]:
    """One line for each kind that either side has; kinds of equal size in one layer are one line."""
    wanted: Counter[Kind] = Counter()
    formulas: dict[Kind, str] = {}
    for call in expected:
        kind = Kind(call.axis, call.layer, call.direction, call.operation, call.elements, call.ranks)
        wanted[kind] += call.times
        formulas[kind] = " or ".join(dict.fromkeys([*filter(None, [formulas.get(kind)]), call.formula]))  # equal by chance: h = s
    kinds = [*wanted, *(kind for kind in found if kind not in wanted)]
    return [Line(kind, formulas.get(kind, "in no closed form"), wanted[kind], found[kind]) for kind in kinds]


def ledger(folder: Path, world: int) -> int:
    """0 where every layout communicates what the closed forms say and its ranks agree, else 1."""
    loaded = folders.load(folder)
    experiment = shrunk(loaded.experiment, world)
    report = Console()
    report.header([("", f"verify {loaded.name} · what one step communicates, whole tensors in fp32"), ("", "")])
    rows = []
    for cut in [cut for w in sorted({min(2, world), world}) for cut in pairwise(w) if w > 1]:
        rows.append(row_of(cut, experiment, loaded.folder))
        report.header([(rows[-1].verdict, heading(rows[-1])), *(("", text) for text in table(rows[-1]))])
    failed, ran = sum(row.verdict == "FAILED" for row in rows), sum(row.verdict != "cannot" for row in rows)
    target = ROOT / experiment.track.runs / loaded.name / "ledger.json"
    sentence = f"{ran - failed} of {ran} layouts communicate what the closed forms say"
    return conclude(report, target, {"rows": [_plain(row) for row in rows]}, sentence, failed > 0)


def heading(row: Row) -> str:
    """A layout's line."""
    if row.why:
        return f"{row.cut} · {row.why}"
    sent = " · ".join(f"{axis} {size / 1e3:,.1f} kB" for axis, size in row.sent.items() if size)
    uncounted = "" if row.counted else " · a variant has no closed form: tensor axis not compared"
    return f"{row.cut} · rank 0 sends {sent or 'nothing'} · {row.seconds:.1f} s{uncounted}"


def table(row: Row) -> list[str]:
    """The lines of the first rank of each stage, equal blocks as one; of any other rank, those that are wrong."""
    texts, leaders = [], range(0, row.cut.world, max(1, row.cut.world // row.cut.pipe))
    for rank, lines in row.lines.items():
        wrong = [line for line in lines if line.expected != line.found]
        shown = _merged(lines) if rank in leaders else [(line, line.kind.layer) for line in wrong]
        texts += [f"         rank {rank}  {_text(line, layers)}" for line, layers in shown]
    return texts


def _merged(lines: Sequence[Line]) -> list[tuple[Line, str]]:
    """Blocks that communicate alike as one line, with all their names."""
    groups: dict[tuple, list[Line]] = {}
    for line in lines:
        block = line.kind.layer.startswith("blocks.")
        key = (line.kind._replace(layer="blocks") if block else line.kind, line.expected, line.found)
        groups.setdefault(key, []).append(line)
    return [(group[0], group[0].kind.layer if len(group) == 1 else f"{len(group)} blocks, each") for group in groups.values()]


def _text(line: Line, layers: str) -> str:
    kind, verdict = line.kind, "" if line.expected == line.found else f"   ← expected {line.expected}"
    size = f"{line.found} × {line.formula} = {kind.elements:,} elements, {4 * kind.elements / 1e3:,.1f} kB"
    return f"{kind.axis:6}  {layers or 'step':13}  {kind.direction:8}  {kind.operation:14}  {size}{verdict}"


def _plain(row: Row) -> dict:
    lines = {rank: [{**line.kind._asdict(), **asdict(line), "kind": None} for line in lines] for rank, lines in row.lines.items()}
    return {**asdict(row), "cut": asdict(row.cut), "lines": lines}
