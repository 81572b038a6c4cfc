"""`python -m research inspect RUN|CHECKPOINT`: what is in it, and with --check whether every byte is still the one that was written."""

import json
from pathlib import Path
from typing import Any

from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.folder import MANIFEST
from parallel.checkpoint.reader import Reader
from parallel.errors import Mistake
from parallel.files import megabytes, read_json
from research.cli.verbs import Parser
from research.tracking import run_folder
from research.tracking.console import Console
from research.tracking.format import compact, plural
from research.tracking.run_folder import RunFolder

WHAT = """Shows a run (its segments, checkpoints and incidents) or a checkpoint (step, tokens, the layout and machine that wrote it, its
tensors and their sizes). Nothing of either is executed: they may be somebody else's."""


def main(argv: list[str]) -> None:
    """Prints it; with --check, exit code 1 where a file is damaged."""
    parser = Parser("inspect", WHAT)
    parser.add_argument("what", help="a run's folder, name or title, or a checkpoint's folder")
    parser.add_argument("--check", action="store_true", help="read every file and compare size and SHA-256 with the manifest")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with its shape and where its pieces lie")
    arguments = parser.parse_args(argv)
    report = Console()
    checkpoints = _checkpoints(arguments.what, report)
    damaged = [text for path in checkpoints if arguments.check for text in check(path, report)]
    if arguments.tensors:
        tensors(checkpoints[-1], report)
    if damaged:
        raise SystemExit(1)


def _checkpoints(what: str, report: Console) -> list[Path]:
    """The checkpoints meant, after what there is to say of them: one that is named, or all of a run."""
    path = Path(what)
    if (path / MANIFEST).is_file():
        describe_checkpoint(path, report)
        return [path]
    folder = run_folder.find(what)
    found = checkpoint_folder.steps(folder.checkpoints)
    describe_run(folder, found, report)
    if not found:
        raise Mistake(
            f"{folder.checkpoints} holds no complete checkpoint → a run writes its first one when it ends, or at checkpoints.every"
        )
    describe_checkpoint(found[-1], report)
    return found


def describe_run(folder: RunFolder, found: list[Path], report: Console) -> None:
    """A run in a few lines."""
    run = read_json(folder.run)
    lines = [("", f"{folder.title} · {run_folder.status(run)} · {run.get('layout', '?')} · {run.get('precision', '?')} · {folder.path}")]
    for i, segment in enumerate(run.get("segments", []), 1):
        words = [f"{i}", f"from step {segment.get('from_step')}", str(segment.get("started")), str(segment.get("layout", ""))]
        lines.append(("segment", " · ".join(word for word in words if word)))
    lines += [("saved", f"{path.name} · {_size(path)}") for path in found]
    lines += [("incident", json.dumps(read_json(path))[:160]) for path in sorted(folder.incidents.glob("*.json"))]
    report.header(lines)


def describe_checkpoint(path: Path, report: Console) -> None:
    """A checkpoint in a few lines."""
    with Reader(path) as reader:
        facts, tables, files = reader.facts, reader.manifest.tensors, reader.manifest.files
        elements = sum(tensor.numel for tensor in reader.tensors.values())
        counted = f"{plural(len(reader.tensors), 'tensor')}, {compact(elements)} elements × {', '.join(tables)}"
        size = megabytes(sum(file.size for file in files.values()))
        report.header(
            [
                ("", f"{path.name} · step {facts['step']} · {facts.get('tokens', 0):,} tokens · {facts.get('samples', 0):,} samples"),
                ("layout", _table(facts.get("layout"))),
                ("machine", _table(facts.get("machine"))),
                ("counters", _table(facts.get("counters"))),
                ("from", _table({key: facts[key] for key in ("config", "commit", "data") if key in facts})),
                ("tensors", f"{counted} · {size} in {plural(len(files), 'file')}"),
            ]
        )


def check(path: Path, report: Console) -> list[str]:
    """What is damaged, file by file; empty: nothing."""
    damaged = []
    with Reader(path) as reader:
        count = len(reader.manifest.files)
        with report.progress(f"checking {path.name}", count) as advance:
            for share in range(count):
                try:
                    reader.check(share, count)
                except Mistake as mistake:
                    damaged.append(str(mistake))
                advance()
    for text in damaged:
        report.warn(text)
    if not damaged:
        report.header([("checked", f"{path.name}: {plural(count, 'file')} as written")])
    return damaged


def tensors(path: Path, report: Console) -> None:
    """Every logical tensor of the weights."""
    with Reader(path) as reader:
        width = max(map(len, reader.tensors))
        for name, tensor in reader.tensors.items():
            shape = " × ".join(map(str, tensor.shape))
            pieces = ", ".join(piece.file for piece in tensor.pieces[:2]) + (" …" if len(tensor.pieces) > 2 else "")
            report.header([("", f"{name:<{width}}  {shape:>14}  {plural(len(tensor.pieces), 'piece')} in {pieces}")])


def _size(path: Path) -> str:
    return megabytes(sum(file.stat().st_size for file in path.iterdir()))


def _table(facts: Any) -> str:
    """'world 2, threads 1, …'; what is no table as it is."""
    if not isinstance(facts, dict):
        return str(facts)[:200]
    return ", ".join(f"{key} {str(value)[:60]}" for key, value in facts.items())
