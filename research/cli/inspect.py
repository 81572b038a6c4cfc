"""`python -m research inspect RUN|CHECKPOINT`: shows what is in it; with --check, whether every byte is still the one that was written.

parallel.checkpoint.reader, which imports torch, is imported where it is used, so that --help and a mistake do not wait for it.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.folder import MANIFEST
from parallel.errors import Mistake
from parallel.files import megabytes, read_json
from research.cli.json_output import add_json_option, only_json_on_stdout, print_json
from research.cli.trained_run import find_run
from research.cli.verbs import Parser
from research.tracking import format as fmt
from research.tracking import run_folder, run_record, run_status
from research.tracking.console import Console
from research.tracking.format import compact, plural
from research.tracking.metrics import finite
from research.tracking.run_folder import RunFolder

LONGEST, MOST_LINES, MOST_ENTRIES = 160, 1000, 10_000
"""The most characters of one value, lines about a run, and entries of a folder that are shown: all may be a stranger's."""

WHAT = """Shows a run (its segments, checkpoints and incidents) or a checkpoint (step, tokens, the layout and machine that wrote it, its
tensors and their sizes). Nothing of either is executed: they may be somebody else's."""


def main(argv: list[str]) -> None:
    """Prints it; with --check, the exit code is 1 if a file is damaged."""
    parser = Parser("inspect", WHAT)
    parser.add_argument("what", help="a run's folder, name or title, or a checkpoint's folder")
    parser.add_argument("--check", action="store_true", help="read every file and compare size and SHA-256 with the manifest")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with its shape and where its pieces lie")
    add_json_option(parser, "the run, the checkpoint and what is damaged")
    arguments = parser.parse_args(argv)
    with only_json_on_stdout(arguments.json):
        shown, damaged = inspect(arguments.what, arguments.check, arguments.tensors)
    if arguments.json:
        print_json({**shown, "damaged": damaged if arguments.check else None})
    if damaged:
        raise SystemExit(1)


def inspect(what: str, check_files: bool, tensors: bool) -> tuple[dict[str, Any], list[str]]:
    """Prints a run or a checkpoint; returns it as JSON data, and one text for each damaged file."""
    console = Console()

    # a checkpoint that is named need not lie in a run's folder; of a run all checkpoints are checked and the newest is shown
    path = Path(what)
    checkpoints, run = [path], None
    if not run_folder.has_file(path, MANIFEST):
        folder = find_run(what)
        checkpoints = checkpoint_folder.steps(folder.checkpoints)
        run = run_as_json(folder, checkpoints)
        describe_run(folder, checkpoints, console)
        if not checkpoints:
            raise Mistake(
                f"{folder.checkpoints} holds no complete checkpoint → a run writes its first one when it ends, or at checkpoints.every"
            )
    describe_checkpoint(checkpoints[-1], console)
    damaged = [text for path in checkpoints if check_files for text in check(path, console)]
    if tensors:
        list_tensors(checkpoints[-1], console)
    return {"run": run, "checkpoint": checkpoint_as_json(checkpoints[-1], tensors)}, damaged


def run_as_json(folder: RunFolder, checkpoints: list[Path]) -> dict[str, Any]:
    """run.json, with the folder, the status as it is now, the checkpoints and the incidents."""
    run = run_record.read(folder)
    saved = [{"name": path.name, "bytes": size_of(path)} for path in checkpoints]
    own = {"folder": str(folder.path), "status": run_status.status(run, folder)}
    return {**run, **own, "checkpoints": saved, "incidents": list(incidents_of(folder))}


def size_of(checkpoint: Path) -> int:
    """The bytes of the files in a checkpoint's folder. A link counts as itself, wherever it leads."""
    return sum(file.lstat().st_size for file in islice(checkpoint.iterdir(), MOST_ENTRIES))


def incidents_of(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """The incidents of a run. Of a file that cannot be read, what is wrong with it."""
    for path in sorted(islice(folder.incidents.glob("*.json"), MOST_ENTRIES)):
        try:
            yield read_json(path)
        except (OSError, ValueError) as error:
            yield {"file": path.name, "unreadable": str(error).partition(" → ")[0]}


def checkpoint_as_json(path: Path, tensors: bool) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run, its files' sizes and, if `tensors`, the shape and the files of each tensor."""
    from parallel.checkpoint.reader import Reader

    with Reader(path) as reader:
        sizes = {name: file.size for name, file in reader.manifest.files.items()}
        shown = {**reader.facts, "folder": str(path), "kinds": list(reader.manifest.tensors), "files": sizes}
        if tensors:
            placed = {
                name: {"shape": list(one.shape), "files": [piece.file for piece in one.pieces]} for name, one in reader.tensors.items()
            }
            shown["tensors"] = placed
        return shown


def describe_run(folder: RunFolder, checkpoints: list[Path], console: Console) -> None:
    """Prints a run: its title, segments, checkpoints and incidents."""
    run = run_record.read(folder)
    title = [folder.title, run_status.status(run, folder), run["layout"] or "?", run["precision"] or "?", str(folder.path)]
    lines = [("", " · ".join(fmt.one_line(part, LONGEST) for part in title))]
    for i, segment in enumerate(run["segments"], 1):
        parts = [f"{i}", f"from step {segment.get('from_step')}", str(segment.get("started")), str(segment.get("layout", ""))]
        lines.append(("segment", " · ".join(fmt.one_line(part, LONGEST) for part in parts if part)))
    lines += [("saved", f"{path.name} · {megabytes(size_of(path))}") for path in checkpoints]
    lines += [("incident", fmt.json_line(finite(incident))[:LONGEST]) for incident in incidents_of(folder)]
    console.header(lines[:MOST_LINES])
    if len(lines) > MOST_LINES:
        console.header([("", f"and {len(lines) - MOST_LINES:,} lines more: --json shows all")])


def describe_checkpoint(path: Path, console: Console) -> None:
    """Prints a checkpoint: what its manifest says of the run, and the sizes of its tensors and files."""
    from parallel.checkpoint.reader import Reader

    def table(values: Any) -> str:
        """'world 2, threads 1, …'; anything but a dict as it is."""
        if not isinstance(values, dict):
            return str(values)[:200]
        return ", ".join(f"{key[:60]} {str(value)[:60]}" for key, value in islice(values.items(), 30))

    with Reader(path) as reader:
        facts, kinds, files = reader.facts, reader.manifest.tensors, reader.manifest.files
        elements = sum(tensor.numel for tensor in reader.tensors.values())
        counts = f"{plural(len(reader.tensors), 'tensor')}, {compact(elements)} elements × {', '.join(kinds)}"
        size = megabytes(sum(file.size for file in files.values()))
        console.header(
            [
                ("", f"{path.name} · step {facts['step']} · {facts.get('tokens', 0):,} tokens · {facts.get('samples', 0):,} samples"),
                ("layout", layout_line(facts.get("layout")) or table(facts.get("layout"))),
                ("machine", table(facts.get("machine"))),
                ("counters", table(facts.get("counters"))),
                ("from", table({key: facts[key] for key in ("config", "commit", "data") if key in facts})),
                ("tensors", f"{counts} · {size} in {plural(len(files), 'file')}"),
            ]
        )


def layout_line(saved: Any) -> str:
    """A manifest's layout as it is shown everywhere, with precision and micro-batches; '' for one that Tessera has not written."""
    try:
        pipe, data, tensor, stage = (int(saved[name]) for name in ("pipe", "data", "tensor", "zero_stage"))
        sequence, optimizer, parameters = (bool(saved[name]) for name in ("sequence", "offload_optimizer", "offload_parameters"))
        shown = fmt.layout(pipe, data, tensor, stage, sequence=sequence, offload_optimizer=optimizer, offload_parameters=parameters)
        micro = f"{int(saved['micro_batch_size'])} micro × {int(saved['micro_batches'])} accumulated"
        return f"{shown} · {str(saved['precision'])[:60]} · {micro}"
    except (KeyError, TypeError, ValueError):
        return ""


def check(path: Path, console: Console) -> list[str]:
    """Prints and returns what is damaged, one text per file; empty if nothing is."""
    from parallel.checkpoint.reader import Reader

    damaged = []
    with Reader(path) as reader:
        count = len(reader.manifest.files)
        with console.progress(f"checking {path.name}", count) as advance:
            for share in range(count):
                try:
                    reader.check(share, count)
                except Mistake as mistake:
                    damaged.append(str(mistake))
                advance()
    for text in damaged:
        console.warn(text)
    if not damaged:
        console.header([("checked", f"{path.name}: {plural(count, 'file')} as written")])
    return damaged


def list_tensors(path: Path, console: Console) -> None:
    """Prints every logical tensor of the weights."""
    from parallel.checkpoint.reader import Reader

    with Reader(path) as reader:
        width = min(max(map(len, reader.tensors)), LONGEST)
        for name, tensor in reader.tensors.items():
            shape = " × ".join(map(str, tensor.shape))
            pieces = ", ".join(piece.file for piece in tensor.pieces[:2]) + (" …" if len(tensor.pieces) > 2 else "")
            console.header(
                [("", f"{fmt.one_line(name, LONGEST):<{width}}  {shape:>14}  {plural(len(tensor.pieces), 'piece')} in {pieces}")]
            )
