"""What `verify --ledger` prints and writes: a heading a layout, a line a kind of collective, ledger.json."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from research import experiment as folders
from research.config import Experiment
from research.cuts import pairwise, shrunk
from research.files import published
from research.report import Report
from research.verification import ROOT
from research.verify_ledger import Line, Row, row_of


def ledger(folder: Path, world: int) -> int:
    """0 where every layout communicates what the closed forms say and its ranks agree, else 1."""
    loaded = folders.load(folder)
    experiment = shrunk(loaded.experiment, world)
    report = Report()
    report.header([("", f"verify {loaded.name} · what one step communicates, whole tensors in fp32"), ("", "")])
    rows = []
    for cut in [cut for w in sorted({min(2, world), world}) for cut in pairwise(w) if w > 1]:
        rows.append(row_of(cut, experiment, loaded.folder))
        report.header([(rows[-1].verdict, heading(rows[-1])), *(("", text) for text in table(rows[-1]))])
    return conclude(report, loaded.name, experiment, rows)


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


def conclude(report: Report, name: str, experiment: Experiment, rows: list[Row]) -> int:
    """ledger.json, the last line, the exit code."""
    failed = [row for row in rows if row.verdict == "FAILED"]
    target = ROOT / experiment.track.runs / name
    target.mkdir(parents=True, exist_ok=True)
    with published(target / "ledger.json") as temporary:
        temporary.write_text(json.dumps({"rows": [_plain(row) for row in rows]}, indent=1, allow_nan=False))
    ran = sum(row.verdict != "cannot" for row in rows)
    words = f"{ran - len(failed)} of {ran} layouts communicate what the closed forms say · {os.path.relpath(target / 'ledger.json')}"
    report.header([("", ""), ("done", words)])
    return 1 if failed else 0


def _plain(row: Row) -> dict:
    lines = {rank: [{**line.kind._asdict(), **asdict(line), "kind": None} for line in lines] for rank, lines in row.lines.items()}
    return {**asdict(row), "cut": asdict(row.cut), "lines": lines}
