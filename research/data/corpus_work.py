"""The folder in which a corpus is made, .NAME.work beside the corpus: what is finished in it survives a kill and is continued with.

plan.json        the options, and the state of the inputs: another plan begins anew
lock             flock of the process that works here, and who it is
inventory.json   what the first reading has found; sources.jsonl: a line for each file
tokenizer/       the tokenizer's files
part_000000.npz  tokens of consecutive groups of text; tokenized.json: how many parts there are in all
result/          what is renamed to the corpus's folder
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from parallel.errors import Mistake
from parallel.files import FULL, published, read_json, sync_folder, sync_tree, write_json
from parallel.process_identity import ProcessIdentity
from research.data.corpus_inputs import Inventory
from research.data.random_split import Part

PLAN, INVENTORY, SOURCES, TOKENIZER, RESULT, LOCK = "plan.json", "inventory.json", "sources.jsonl", "tokenizer", "result", "lock"
TOKENIZED = "tokenized.json"
MADE = (SOURCES, "train.idx")
"""Files that only a finished corpus has."""
AGAIN = "the same command continues"


class Work:
    """The work on one corpus. Made by `opened`, in one process at a time."""

    def __init__(self, target: Path, path: Path) -> None:
        self.target, self.path = target, path

    def begin_or_continue(self, plan: dict[str, Any]) -> str:
        """Keeps the work of an earlier process with the same plan, and removes all other work. Returns why, if there was another plan."""
        known, why = None, ""
        if (self.path / PLAN).is_file():
            with contextlib.suppress(Mistake, OSError):
                known = read_json(self.path / PLAN)
        if known != plan:
            if known:
                differing = [name for name in plan if known.get(name) != plan[name]]
                why = f"{' and '.join(differing)} changed since this corpus was begun"
            for entry in self.path.iterdir():
                if entry.name != LOCK:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            write_json(self.path / PLAN, plan)
        return why

    @property
    def inventory(self) -> Inventory | None:
        """What the first reading has found, if it has ended."""
        path = self.path / INVENTORY
        try:
            return Inventory(**read_json(path)) if path.is_file() else None
        except (Mistake, TypeError):
            return None  # it is damaged: everything is read again

    def keep_inventory(self, inventory: Inventory) -> None:
        """Writes the inventory, which ends the first reading."""
        write_json(self.path / INVENTORY, dataclasses.asdict(inventory))

    @property
    def finished_parts(self) -> int:
        """How many parts the whole corpus has; -1 as long as that is not known."""
        path = self.path / TOKENIZED
        try:
            return int(read_json(path)["parts"]) if path.is_file() else -1
        except (ValueError, KeyError, TypeError):
            return -1

    @finished_parts.setter
    def finished_parts(self, number: int) -> None:
        write_json(self.path / TOKENIZED, {"parts": number})

    def part_file(self, number: int) -> Path:
        """The file of a part, counted from 0."""
        return self.path / f"part_{number:06d}.npz"

    def keep_part(self, number: int, part: Part, groups: int, cuts: int) -> None:
        """Writes the part, which came from so many groups of text, cut at so many places where ids may differ."""
        with published(self.part_file(number)) as temporary, open(temporary, "wb") as file:
            counts = np.array([part.is_open, groups, cuts], np.int64)
            arrays = {"ids": part.ids, "tokens": part.tokens, "num_bytes": part.num_bytes, "counts": counts}
            np.savez(file, **(arrays if part.mask is None else {**arrays, "mask": part.mask}))  # type: ignore[arg-type]

    def parts(self) -> Iterator[tuple[Part, int, int]]:
        """Each finished part with its groups and cuts, in order, up to the first that is missing or damaged."""
        for number in range(10**6):
            path = self.part_file(number)
            if not path.is_file():
                return
            try:
                with np.load(path, allow_pickle=False) as file:
                    is_open, groups, cuts = file["counts"].tolist()
                    mask = file.get("mask")
                    part = Part(file["ids"], file["tokens"], file["num_bytes"], bool(is_open), mask)
            except (OSError, ValueError, KeyError, EOFError, RuntimeError, SyntaxError, zipfile.BadZipFile, zlib.error):
                return  # all that zipfile and numpy raise for damaged bytes
            yield part, groups, cuts

    def publish(self, replace: bool) -> None:
        """Renames the result to the corpus's folder. A corpus that is replaced is renamed first and removed afterwards."""
        old, done = _hidden(self.target, "replaced"), _hidden(self.target, "done")
        sync_tree(self.path / RESULT)
        _check_target(self.target, replace)
        if self.target.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.target.rename(old)
        (self.path / RESULT).rename(self.target)
        sync_folder(self.target.parent)
        self.path.rename(done)  # from here on nothing is left to continue with
        for folder in (old, done):
            shutil.rmtree(folder, ignore_errors=True)

    def is_worth_keeping(self) -> bool:
        """Whether a later process could continue with anything here."""
        return self.part_file(1).is_file()


@contextlib.contextmanager
def opened(target: Path, replace: bool) -> Iterator[Work]:
    """The work folder of the corpus `target`, which this process alone works in until the body ends.

    A Mistake if another process does, if `target` exists and is not to be replaced or is no corpus, or if the disk refuses. After a
    Mistake in the body nothing is left of a folder in which nothing is finished.
    """
    path, old = _hidden(target, "work"), _hidden(target, "replaced")
    work = Work(target, path)
    try:
        try:
            _check_target(target, replace)
        except Mistake:
            _remove_leftovers(target)
            raise
        made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
        with _locked(path, target):
            try:
                shutil.rmtree(_hidden(target, "done"), ignore_errors=True)
                if old.exists() and not target.exists():  # a process was killed between the two renames
                    old.rename(target)
                _check_target(target, replace)  # another process may have published it in the meantime
                yield work
            except Mistake:
                if not work.is_worth_keeping():
                    shutil.rmtree(path, ignore_errors=True)
                    for folder in made:
                        with contextlib.suppress(OSError):
                            folder.rmdir()
                raise
    except OSError as error:
        where = error.filename2 or error.filename or path
        room = "make room" if error.errno in FULL else "check the folder and its permissions"
        raise Mistake(f"{where} cannot be written ({error.strerror or error}) → {room}; {AGAIN}") from error


def _check_target(target: Path, replace: bool) -> None:
    """A Mistake if there is anything in the place of the corpus, except for a corpus that is to be replaced."""
    if not target.exists() and not target.is_symlink():
        return
    if not replace:
        raise Mistake(f"{target} is there already → name another corpus, or add --replace")
    if target.is_symlink() or not all((target / name).is_file() for name in MADE):
        raise Mistake(f"{target} is no corpus that prepare has made, and is not replaced → name another corpus, or remove it")


def _hidden(target: Path, what: str) -> Path:
    """The folder .NAME.work beside the corpus NAME, or another one of its kind."""
    return target.with_name(f".{target.name}.{what}")


def _remove_leftovers(target: Path) -> None:
    """Removes what a process that was killed after it published the corpus has left beside it, the corpus that it replaced included."""
    path = _hidden(target, "work")
    shutil.rmtree(_hidden(target, "done"), ignore_errors=True)
    if (path / TOKENIZED).is_file() and not (path / RESULT).exists():
        with contextlib.suppress(Mistake, OSError), _locked(path, target):
            if not (path / RESULT).exists():
                shutil.rmtree(path)
    if (target / SOURCES).is_file() and not path.exists():  # nobody is about to rename anything
        shutil.rmtree(_hidden(target, "replaced"), ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, target: Path) -> Iterator[None]:
    """Holds the lock of the folder, which is made if it is missing. A Mistake says which process holds it."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path / LOCK, "a+b")  # noqa: SIM115
        except FileNotFoundError:  # removed in this moment by the process that has finished
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Mistake(f"{target} is being prepared by {_holder(file)} → wait for it, or name another corpus") from None
            except OSError:  # this file system has no locks
                pass
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path / LOCK)):
                    file.truncate(0)
                    file.write(json.dumps(dataclasses.asdict(ProcessIdentity.current())).encode())
                    file.flush()
                    yield
                    return


def _holder(file: BinaryIO) -> str:
    """'process 123 on host', as far as the lock's file says."""
    file.seek(0)
    with contextlib.suppress(ValueError):
        values = json.loads(file.read(4096))
        if isinstance(values, dict) and (process := ProcessIdentity.from_json(values)):
            return str(process)
    return "another process"
