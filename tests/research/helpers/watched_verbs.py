"""Runs a verb of `python -m research` in a forked child that is watched: what it writes, executes and prints, its memory and its time.

Memory is the child's largest resident set (rusage, its own children included) less what it is resident with when the verb begins, which
is what it has from this process: what the verb has added. Libraries must be imported here before, or they count. Writes and executions
are seen by an audit hook, which forked children inherit, and by what has changed on the disk.
"""

import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

from research import ROOT
from tests.research.helpers.launches import ROOT as TREE

PATIENCE = 60.0
"""Seconds after which a verb is taken to hang."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.mkdir": [(0, 2)], "os.rename": [(0, 2), (1, 3)], "os.remove": [(0, 1)], "os.rmdir": [(0, 1)], "os.symlink": [(1, 2)],
    "os.link": [(1, 3)], "os.truncate": [(0, 0)],
}  # fmt: skip
"""Event -> the places of the paths that it changes, and of the folder's descriptor that each may be relative to."""
RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pickle.find_class", "socket.connect")
assert ROOT == TREE


@dataclass(frozen=True)
class Watched:
    """What a verb did."""

    code: int
    out: str
    err: str
    seconds: float
    cpu_seconds: float
    added_mb: float
    wrote: list[str]
    """Paths that it wrote, made or removed, without those that it may."""
    executed: list[str]
    """Programs that it started, and code of the watched place that it ran."""


def watched(argv: list[str], place: Path) -> Watched:
    """Runs the verb with the arguments `argv` in the folder `place`. It may write into place/tree, place/runs and place/tmp."""
    for name in ("tmp", "watch"):
        (place / name).mkdir(exist_ok=True)
    log = os.open(place / "watch" / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_child(argv, place, log)
    os.close(log)
    status, usage = _ended(child)
    events = [line.partition(" ") for line in (place / "watch" / "log").read_text(errors="replace").split("\n") if line]
    before = next(int(what) for kind, _, what in events if kind == "before")
    allowed = [str(place / name) for name in ("tree", "runs", "tmp", "watch")] + [str(ROOT / ".cache"), "/dev/"]
    return Watched(
        code=os.waitstatus_to_exitcode(status),
        out=(place / "watch" / "out").read_text(errors="surrogateescape"),
        err=(place / "watch" / "err").read_text(errors="surrogateescape"),
        seconds=time.monotonic() - began,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        added_mb=usage.ru_maxrss / 1024 - before / 2**20,
        wrote=[path for kind, _, path in events if kind == "write" and not any(path.startswith(one) for one in allowed)],
        executed=[what for kind, _, what in events if kind == "run"],
    )


def _ended(child: int) -> tuple[int, Any]:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return status, usage
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return status, usage


def _be_child(argv: list[str], place: Path, log: int) -> NoReturn:
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(place)
        tempfile.tempdir = str(place / "tmp")
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(place / "watch" / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # type: ignore[misc]  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", closefd=False)  # type: ignore[misc]  # noqa: SIM115
        from research.__main__ import main
        from research.tracking.streams import prepare_streams

        prepare_streams()
        os.write(log, f"before {psutil.Process().memory_info().rss}\n".encode())
        sys.addaudithook(_hook(str(place), log))
        code = main(argv)
        sys.stdout.flush()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(code)


def _hook(place: str, log: int) -> Any:
    """An audit hook that writes a line for each event that changes the disk or runs something."""

    def told(kind: str, what: Any) -> None:
        text = os.path.abspath(os.fsdecode(what)) if kind == "write" else str(what)
        os.write(log, f"{kind} {text[:500]!s}\n".replace("\x00", "").encode(errors="replace").replace(b"\n", b" ", text.count("\n")))

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and isinstance(flags, int) and flags & WRITING:
                told("write", path)
        elif event in CHANGES:
            for i, at in CHANGES[event]:
                if isinstance(arguments[i], (str, bytes)):
                    folder = os.readlink(f"/proc/self/fd/{arguments[at]}") if isinstance(arguments[at], int) and arguments[at] >= 0 else ""
                    told("write", os.path.join(folder, os.fsdecode(arguments[i])))
        elif event in RUNS and arguments[0] != "git":  # an import writes down the commit of its own tree
            told("run", (event, *map(str, arguments[:2])))
        elif event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(place):
            told("run", arguments[0].co_filename)

    return hook
