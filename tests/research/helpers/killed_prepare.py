"""Runs `prepare` again and again in forks of one process, each ended in its own way at a moment of its own, and says what is left.

A moment is the n-th time that the process opens, renames, makes or removes a file in the folder of corpora (sys.addaudithook).
"""

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from research.__main__ import main
from research.cli import prepare as verb
from research.data import corpus, corpus_inputs

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def ended(arguments: list[str], corpora: Path, sizes: list[int], moment: int = 0, number: int = 0, most_bytes: int = 0) -> dict[str, Any]:
    """What `prepare` says and returns if signal `number` comes at `moment`, or a file may have `most_bytes`."""
    log = corpora.with_suffix(".log")
    child = os.fork()
    if child == 0:
        log.unlink(missing_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        corpus.PART_TOKENS, corpus_inputs.GROUP = sizes
        if most_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        count = _end_at(moment, number, str(corpora))
        code = 1
        with contextlib.suppress(SystemExit):
            code = main(["prepare", *arguments, "--corpora", str(corpora)])
        sys.stdout.flush()
        if not moment:
            (corpora.with_suffix(".moments")).write_text(str(count[0]))
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    return {"code": os.waitstatus_to_exitcode(status), "said": log.read_text()}


def _end_at(moment: int, number: int, place: str) -> list[int]:
    """Sends this process the signal at the moment. Returns the count of moments so far, in a list."""
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and arguments and isinstance(arguments[0], (str, os.PathLike)) and str(arguments[0]).startswith(place):
            count[0] += 1
            if count[0] == moment:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)
    return count


def digest(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in the folder, hidden ones and those of subfolders included."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def killed(plan: dict[str, Any]) -> dict[str, Any]:
    """`plan`: arguments, folder, sizes, kills (how many), seed. For each kill: its moment, and whether a restart gives the same files."""
    folder, arguments, sizes = Path(plan["folder"]), plan["arguments"], plan["sizes"]
    whole = folder / "whole"
    undisturbed = ended(arguments, whole, sizes)
    expected, moments = digest(whole), int(whole.with_suffix(".moments").read_text())
    draw, kills = random.Random(plan["seed"]), []
    for number in range(plan["kills"]):
        place, moment = folder / f"kill_{number}", draw.randrange(1, moments + 1)
        first = ended(arguments, place, sizes, moment, signal.SIGKILL)
        left = sorted(path.name for path in place.rglob("part_*")) if place.is_dir() else []
        again = ended(arguments, place, sizes)
        kills.append({"moment": moment, "code": first["code"], "parts": len(left), "again": again, "same": digest(place) == expected})
        shutil.rmtree(place)
    return {"undisturbed": undisturbed, "expected": expected, "moments": moments, "kills": kills}


if __name__ == "__main__":
    assert verb.main  # imported once, before the forks
    print(json.dumps(killed(json.loads(sys.argv[1]))))
