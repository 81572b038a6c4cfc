"""Counts what every layout communicates on its real engine and compares it with closed forms: calls and elements by axis and layer.

`verify --ledger` prints one heading per layout and one line per kind of collective, and writes ledger.json beside the experiment's runs.
"""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from models import architectures
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
from research.config.layout import sample_length
from research.config.schema import LOSSES
from research.tracking.console import Console
from research.training.sampler import context_of
from research.verification.hangs import advance_at_layers, describe_hang, ended_if_hung, hung_ranks
from research.verification.layouts import LayoutCase, pairwise, shrunk, why_not
from research.verification.results import conclude, row_fields
from research.verification.training import HANG_SECONDS, engine_of, loss_of, read_job, share_of, write_job

STEPS = 2
"""The second step is counted. In the first, the stages of DeepSpeed's pipeline also send each other the shapes."""
PATIENCE = 300.0
"""Seconds for a whole layout. Ranks that make no progress end much sooner (research/verification/hangs.py)."""


class Kind(NamedTuple):
    """A kind of collective. Collectives with equal fields are one line of the table."""

    axis: str
    layer: str
    direction: str
    operation: str
    elements: int
    ranks: int


@dataclass(frozen=True)
class Line:
    """The calls of one kind of collective that one rank makes in one step: expected by the closed form, and counted."""

    kind: Kind
    formula: str
    expected: int
    found: int


@dataclass
class Row:
    """The verdict on one layout: the lines of every rank, or the reason why there are none."""

    case: LayoutCase
    verdict: str
    """pass, FAILED or cannot."""
    lines: dict[int, list[Line]] = field(default_factory=dict)
    why: str = ""
    seconds: float = 0.0
    sent: dict[str, float] = field(default_factory=dict)
    """Bytes that rank 0 sends in a step on a ring, by axis."""
    counted: bool = True
    """Whether the tensor axis has a closed form to compare with."""


def ledger(folder: Path, world: int) -> int:
    """Counts what the experiment in `folder` communicates on layouts of 2 and of `world` ranks.

    Returns 0 if every layout communicates what the closed forms say and its ranks agree, else 1.
    """
    loaded = folders.load(folder)
    experiment = shrunk(loaded.experiment, world, STEPS)
    console = Console()
    console.header([("", f"verify {loaded.name} · what one step communicates, whole tensors in fp32"), ("", "")])
    rows = []
    for case in [case for w in sorted({min(2, world), world}) for case in pairwise(w) if w > 1]:
        row = row_of(case, experiment, loaded.folder)
        console.header([(row.verdict, heading(row)), *(("", text) for text in table(row))])
        rows.append(row)
    failed, ran = sum(row.verdict == "FAILED" for row in rows), sum(row.verdict != "cannot" for row in rows)

    results = []
    for row in rows:
        lines = {rank: [{**line.kind._asdict(), **asdict(line), "kind": None} for line in lines] for rank, lines in row.lines.items()}
        results.append({**row_fields(row), "lines": lines})
    target = ROOT / experiment.track.runs / loaded.name / "ledger.json"
    sentence = f"{ran - failed} of {ran} layouts communicate what the closed forms say"
    return conclude(console, target, {"rows": results}, sentence, failed > 0)


def row_of(case: LayoutCase, experiment: Experiment, variants: Path, train: Callable | None = None, patience: float = PATIENCE) -> Row:
    """Trains two steps on one layout and compares the second. Every rank runs `train`; tests pass one in which something is broken."""
    why = why_not(case, experiment)
    if why:
        return Row(case, "cannot", why=why)
    # ZeRO-3 with its own sizes: with smaller ones, parameters are gathered at each use, which has no closed form.
    experiment = experiment.model_copy(update={"deepspeed": {}})
    began, failure = time.monotonic(), ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_job(folder, experiment, case, STEPS, variants)
        try:
            forked_ranks.run(train or on_rank, case.world, folder, patience)
        except forked_ranks.RankFailed as error:
            hung = hung_ranks(folder, case.world)
            failure = describe_hang(HANG_SECONDS, hung, case.world) if hung else str(error)
        records = [read(folder, rank) for rank in range(case.world)]
        shapes = [] if failure else [json.loads((folder / f"shapes_{rank}.json").read_text()) for rank in range(case.world)]
    difference = first_difference([[entry for step in steps for entry in step] for steps in records])
    if failure or difference:
        return Row(case, "FAILED", why=difference or failure, seconds=time.monotonic() - began)
    last = [steps[-1] for steps in records]
    return compared(case, experiment, last, shapes, load_variants(variants, experiment), time.monotonic() - began)


def on_rank(folder: Path, hang_seconds: float = HANG_SECONDS) -> None:
    """Trains the folder's job and writes every collective to a file before it is issued, one line each. Collective."""
    experiment, case, steps, source = read_job(folder)
    grid = make_grid(case.pipe, case.tensor, case.sequence)
    with (
        ended_if_hung(folder, grid.rank, hang_seconds) as progress,
        (folder / f"ledger_{grid.rank}.jsonl").open("w", buffering=1) as file,  # line-buffered: a killed rank loses no whole line
    ):
        progress.advance("building the engine")
        variants = load_variants(source, experiment)  # once: the classes of a variant.py may share its module's state
        book = Ledger(grid, lambda entry: print(json.dumps(entry), file=file))
        engine = engine_of(experiment, case, grid, variants, book.within("loss", loss_of(experiment, grid, variants)))
        engine.module.watch(book.within)
        engine.module.watch(advance_at_layers(progress))
        for step in range(steps):
            progress.stepping(step + 1)
            print(json.dumps("step"), file=file)
            book.between_steps()
            with book:
                engine.train_batch(share_of(experiment, step, grid, case), experiment.optimizer.lr)
    shapes = [slice_of(parameter).local_shape(grid.tensor) for parameter in engine.parameters.values()]
    (folder / f"shapes_{grid.rank}.json").write_text(json.dumps(shapes))


def read(folder: Path, rank: int) -> list[list[Entry]]:
    """The entries of a rank by step; an empty list if it wrote none. A line that is incomplete because the rank was killed is left out."""
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
    case: LayoutCase,
    experiment: Experiment,
    entries_by_rank: Sequence[Sequence[Entry]],
    shapes: list[list[list[int]]],
    variants: Mapping[str, Any],
    seconds: float,
) -> Row:
    """Compares the counted step with the closed forms, rank by rank. With a variant's own class in the model, the tensor axis has none."""
    closed = communication.has_closed_form(experiment.model) and experiment.loss in LOSSES
    axes = ("tensor", "pipe", "data") if closed else ("pipe", "data")
    lines = {}
    for rank, entries in enumerate(entries_by_rank):
        place = Grid(case.pipe, case.data, case.tensor, rank)
        expected = [call for call in calls(experiment, case, place, [tuple(s) for s in shapes[rank]], variants) if call.axis in axes]
        lines[rank] = beside(expected, counted(entry for entry in entries if entry.axis in axes))
    agrees = all(line.expected == line.found for by_rank in lines.values() for line in by_rank)
    tensors = [entry for entry in entries_by_rank[0] if not bookkeeping(entry)]
    sent = {axis: sum(entry.sent for entry in tensors if entry.axis == axis) for axis in ("tensor", "pipe", "data")}
    return Row(case, "pass" if agrees else "FAILED", lines, seconds=seconds, sent=sent, counted=closed)


def calls(
    experiment: Experiment, case: LayoutCase, place: Grid, shapes: Sequence[tuple[int, ...]], variants: Mapping[str, Any]
) -> list[Call]:
    """The calls that the closed forms give for one step of the rank at `place`. `shapes` are those of its parameters."""
    model = experiment.model
    # The layers of this rank's stage.
    layers = architectures.layers(model, Grid(), experiment.seed, variants, context=context_of(experiment, variants))
    bounds = stage_bounds(layers, case.pipe)
    names = {layer.name for layer in layers[bounds[place.pipe_rank] : bounds[place.pipe_rank + 1]]}
    names |= {"loss"} if place.is_last_stage else set()

    per_micro_batch = communication.tensor_calls(model, case.tensor, case.sequence, case.recompute, case.micro_batch)
    tensor = [replace(call, times=call.times * case.accumulated) for call in per_micro_batch if call.layer in names]
    activation = case.micro_batch * sample_length(model) * model.hidden_size // (case.tensor if case.sequence else 1)
    table = -(-model.vocab_size // case.tensor) * model.hidden_size if model.tied else 0
    formula = "b·s·h/t" if case.sequence else "b·s·h"
    pipe = pipe_calls(place.pipe_rank, case.pipe, activation, formula, case.accumulated, table)
    return [*tensor, *pipe, *data_calls(case.zero_stage, shapes, case.data, case.accumulated)]


def counted(entries: Iterable[Entry]) -> Counter[Kind]:
    """The number of calls by kind, without bookkeeping.

    On the data axis, where DeepSpeed's buckets split tensors in any way, all elements of one operation count as one call.
    """
    counts: Counter[Kind] = Counter()
    totals: Counter[Kind] = Counter()
    for entry in entries:
        if bookkeeping(entry):
            continue
        if entry.axis == "data":
            totals[Kind("data", "", "", entry.operation, 0, len(entry.ranks))] += entry.elements
        else:
            layer, direction = (entry.layer, entry.direction) if entry.axis == "tensor" else ("", "")
            counts[Kind(entry.axis, layer, direction, entry.operation, entry.elements, len(entry.ranks))] += 1
    for kind, elements in totals.items():
        counts[kind._replace(elements=elements)] = 1
    return counts


def beside(expected: Iterable[Call], counts: Counter[Kind]) -> list[Line]:
    """One line for each kind that is expected or counted. Expected calls of equal size in one layer are one line."""
    wanted: Counter[Kind] = Counter()
    formulas: dict[Kind, str] = {}
    for call in expected:
        kind = Kind(call.axis, call.layer, call.direction, call.operation, call.elements, call.ranks)
        wanted[kind] += call.times
        formulas[kind] = " or ".join(dict.fromkeys([*filter(None, [formulas.get(kind)]), call.formula]))  # equal by chance: h = s
    kinds = [*wanted, *(kind for kind in counts if kind not in wanted)]
    return [Line(kind, formulas.get(kind, "in no closed form"), wanted[kind], counts[kind]) for kind in kinds]


def heading(row: Row) -> str:
    """The line of a layout: what rank 0 sends, or why there is nothing to compare."""
    if row.why:
        return f"{row.case} · {row.why}"
    sent = " · ".join(f"{axis} {size / 1e3:,.1f} kB" for axis, size in row.sent.items() if size)
    uncounted = "" if row.counted else " · a variant has no closed form: tensor axis not compared"
    return f"{row.case} · rank 0 sends {sent or 'nothing'} · {row.seconds:.1f} s{uncounted}"


def table(row: Row) -> list[str]:
    """The lines under a heading: all lines of the first rank of each stage, and of every other rank the lines that differ."""
    texts, leaders = [], range(0, row.case.world, max(1, row.case.world // row.case.pipe))
    for rank, lines in row.lines.items():
        differing = [line for line in lines if line.expected != line.found]
        shown = _merged(lines) if rank in leaders else [(line, line.kind.layer) for line in differing]
        for line, layers in shown:
            kind, difference = line.kind, "" if line.expected == line.found else f"   ← expected {line.expected}"
            size = f"{line.found} × {line.formula} = {kind.elements:,} elements, {4 * kind.elements / 1e3:,.1f} kB"
            what = f"{kind.axis:6}  {layers or 'step':13}  {kind.direction:8}  {kind.operation:14}"
            texts.append(f"         rank {rank}  {what}  {size}{difference}")
    return texts


def _merged(lines: Sequence[Line]) -> list[tuple[Line, str]]:
    """Each line with its layer's name. Blocks that communicate alike are one line."""
    groups: dict[tuple, list[Line]] = {}
    for line in lines:
        block = line.kind.layer.startswith("blocks.")
        key = (line.kind._replace(layer="blocks") if block else line.kind, line.expected, line.found)
        groups.setdefault(key, []).append(line)
    return [(group[0], group[0].kind.layer if len(group) == 1 else f"{len(group)} blocks, each") for group in groups.values()]
