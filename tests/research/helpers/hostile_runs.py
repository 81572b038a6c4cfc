"""Hostile checkpoints and run folders, each wrong in one way (hostile_cases.py)."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from parallel.checkpoint.manifest import digest
from research.tracking.run_folder import RunFolder
from tests.research.helpers.hostile_cases import (
    FILES,
    STEERING,
    TENSORS,
    WRONG,
    Bases,
    Case,
    assign,
    changed,
    pipe,
    place_of,
    replaced,
)

RUN_FIELDS = ("status", "started", "ended", "layout", "precision", "steps", "reason", "overrides", "segments", "pid", "host")
SETTINGS = (
    "schema", "question", "model", "data", "precision", "seed", "schedule", "parallel", "track", "model.num_layers", "model.hidden_size",
    "model.num_heads", "model.num_kv_heads", "model.vocab_size", "model.seq_length", "model.norm", "model.norm_eps", "data.tokenizer",
)  # fmt: skip


def checkpoint_cases(bases: Bases) -> Iterator[Case]:
    """Wrong manifests, with the right digest of themselves; and files that are none."""

    def case(name: str, act: Callable[[Path], Any], *verb: str) -> Case:
        def make(place: Path) -> list[str]:
            run = copied_run(bases, place)
            (checkpoint,) = (path for path in run.checkpoints.iterdir() if path.is_dir())
            act(checkpoint)
            return [*(verb or ("inspect", "--check")), str(run.path if verb else checkpoint)]

        return Case(f"checkpoint: {name}", make)

    def signed(act: Callable[[dict], None]) -> Callable[[Path], None]:
        def change(checkpoint: Path) -> None:
            table = json.loads((checkpoint / "manifest.json").read_text())
            table.pop("sha256")
            act(table)
            (checkpoint / "manifest.json").write_text(json.dumps(table | {"sha256": digest(table)}))

        return change

    def first(table: dict, name: str) -> tuple[dict, str]:
        """The table of files, or of weights, and the first name in it."""
        found = table["files"] if name == "files" else table["tensors"]["weights"]
        return found, next(iter(found))

    for name, make in FILES.items():
        yield case(
            f"manifest.json is {name}", lambda folder, make=make: replaced(folder / "manifest.json", make), "generate", "--prompt", "a"
        )
    for name, make in TENSORS.items():
        yield case(f"the weights are {name}", lambda folder, make=make: replaced(next(folder.glob("*.safetensors")), make))
    for field in ("format", "step", "tokens", "files", "tensors"):
        for name in ("text", "negative", "beyond", "float", "list", "null"):
            yield case(f"{field} is {name}", signed(assign(field, WRONG[name])))
    for part in ("shape", "dtype", "pieces"):
        for name in ("text", "huge", "beyond", "list", "table"):

            def wrong(table: dict, part: str = part, value: Any = WRONG[name]) -> None:
                tensors, first_name = first(table, "weights")
                tensors[first_name][part] = [value, value] if part == "shape" and isinstance(value, int) else value

            yield case(f"{part} of a tensor is {name}", signed(wrong))

    def renamed(new: str) -> Callable[[dict], None]:
        def act(table: dict) -> None:
            files, name = first(table, "files")
            files[new] = files.pop(name)

        return act

    for new in ("../../../secret.json", "/etc/passwd", STEERING, "a" * 5000):
        yield case(f"a file is called {new[:12]!r}", signed(renamed(new)))


# Run folders


def copied_run(bases: Bases, place: Path) -> RunFolder:
    """A copy of the good run, which this checkout has not made, on a text that comes with the code: `generate` works with it."""
    target = place / "runs" / "small" / "abcdef"
    shutil.copytree(bases.run, target, symlinks=True)
    (target / "made_here").unlink()
    texts = {"train": "builtin:state_of_the_union/val", "validation": "builtin:state_of_the_union/val"}
    changed(target / "config.json", lambda table: table["data"].update(texts))
    return RunFolder(target)


def run_cases(bases: Bases) -> Iterator[Case]:
    """Wrong run.json, config.json, rows, and what config.json may make a verb read, write and execute."""

    def case(name: str, act: Callable[[RunFolder], Any], *verb: str, shown: bool = False) -> Case:
        def make(place: Path) -> list[str]:
            run = copied_run(bases, place)
            act(run)
            return [*verb, *([str(run.path)] if verb[0] != "runs" else [])]

        return Case(f"run: {name} ({verb[0]})", make, shown)

    generate = ("generate", "--prompt", "the people", "--max_new_tokens", "2")
    data = ("data", "--step", "1")
    for name, make in FILES.items():
        yield case(f"run.json is {name}", lambda run, make=make: replaced(run.run, make), "runs", shown=True)
        yield case(f"config.json is {name}", lambda run, make=make: replaced(run.config, make), *generate)
        yield case(f"metrics.jsonl is {name}", lambda run, make=make: replaced(run.metrics, make), "runs", shown=True)
        yield case(f"metrics.jsonl is {name}", lambda run, make=make: replaced(run.metrics, make), "plot")
        yield case(f"checkpoints/ is {name}", lambda run, make=make: replaced(run.checkpoints, make), *generate)
        yield case(f"metrics.jsonl is {name}", lambda run, make=make: replaced(run.metrics, make), *data)
    for field in RUN_FIELDS:
        for name in ("text", "long", "beyond", "list", "null"):
            change = assign(field, WRONG[name])
            yield case(f"{field} is {name}", lambda run, change=change: changed(run.run, change), "runs", shown=True)
            yield case(f"{field} is {name}", lambda run, change=change: changed(run.run, change), "inspect", shown=True)
    for field in SETTINGS:
        for name in ("text", "long", "negative", "huge", "beyond", "NaN", "list"):
            yield case(f"{field} is {name}", functools.partial(_change_settings, assign(field, WRONG[name])), *generate)
    for field, name in (("data.train", "secret.txt"), ("data.tokenizer", "secret.json")):
        yield case(f"{field} is a secret", functools.partial(_with_secret, field, name), *generate)
        yield case(f"{field} is a secret", functools.partial(_with_secret, field, name), *data)
    yield case("data.validation is a secret", functools.partial(_with_secret, "data.validation", "secret.txt"), "evaluate", "--limit", "1")
    yield case("variant.py is a program", _with_variant, *generate)
    yield case("incidents are pipes", lambda run: (run.incidents.mkdir(), pipe(run.incidents / "a.json")), "inspect", shown=True)
    yield case("latest is a pipe", lambda run: replaced(run.checkpoints / "latest", pipe), *generate)
    yield case("the checkpoints' cache is elsewhere", _with_cache, *generate, shown=True)
    yield case("evaluations/ leads elsewhere", _with_link("evaluations"), "evaluate", "--tasks", "agreement", "--limit", "1")
    yield case("wandb/ leads elsewhere", _with_link("wandb"), "track", "--mode", "offline")


def _change_settings(act: Callable[[dict], None], run: RunFolder) -> None:
    changed(run.config, act)


def _with_secret(field: str, name: str, run: RunFolder) -> None:
    """A file of its reader, named by its whole path. A tokenizer that is trained on it would show its words."""
    changed(run.config, assign(field, str(place_of(run.path) / name)))


def _with_variant(run: RunFolder) -> None:
    (run.source / "variant.py").write_text(f"open({str(place_of(run.path) / 'ran')!r}, 'w')\nclass Mine: pass\n")
    changed(run.config, assign("model.norm", "variant:Mine"))


def _with_cache(run: RunFolder) -> None:
    """A run whose config.json has the cache in a folder that is not its own to choose."""
    changed(run.config, assign("data.cache", str(place_of(run.path) / "elsewhere")))


def _with_link(name: str) -> Callable[[RunFolder], None]:
    def act(run: RunFolder) -> None:
        elsewhere = place_of(run.path) / "elsewhere"
        elsewhere.mkdir()
        _with_cache(run)
        replaced(run.path / name, lambda path: path.symlink_to(elsewhere))

    return act
