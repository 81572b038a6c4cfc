"""Run folders of strangers whose config.json names what a verb would read, write or execute: for `replay`, which trains a step again.

Also files in the run's own folder that make much of little: a text that unpacks to gigabytes, a tokenizer without end.
"""

import functools
import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from research.tracking.run_folder import RunFolder
from tests.research.helpers.hostile_cases import Bases, Case, assign, changed
from tests.research.helpers.hostile_models import tokenizer_bombs
from tests.research.helpers.hostile_runs import copied_run

GENERATE = ("generate", "--prompt", "the people", "--max_new_tokens", "2")
REPLAY = ("replay", "--step", "1")
EVALUATE = ("evaluate", "--limit", "1")


def settings_cases(bases: Bases) -> Iterator[Case]:
    """All of them; their names begin with `settings: `."""

    def case(name: str, act: Callable[[RunFolder, Path], Any], *verb: str) -> Case:
        def make(place: Path) -> list[str]:
            run = copied_run(bases, place)
            act(run, place)
            return [*verb, str(run.path)]

        return Case(f"settings: {name} ({verb[0]})", make)

    def setting(field: str, value: Callable[[RunFolder, Path], Any]) -> Callable[[RunFolder, Path], None]:
        return lambda run, place: changed(run.config, assign(field, value(run, place)))

    for field, name in (("data.train", "secret.txt"), ("data.validation", "secret.txt"), ("data.tokenizer", "secret.json")):
        yield case(f"{field} is a secret", setting(field, lambda run, place, name=name: str(place / name)), *REPLAY)
    for field in ("model.norm", "loss", "optimizer.name", "optimizer.decay", "evaluate.measure"):
        yield case(f"{field} is a program", functools.partial(_with_program, field), *REPLAY)
    for writer, table in monitors().items():
        yield case(f"DeepSpeed's {writer} writes elsewhere", setting("deepspeed", table), *REPLAY)
    yield case("init_from is elsewhere", setting("init_from", _copied_checkpoint), *REPLAY)
    yield case("init_from is a link to elsewhere", setting("init_from", _linked_checkpoint), *REPLAY)
    for field, verb in (("data.train", GENERATE), ("data.train", REPLAY), ("data.validation", EVALUATE), ("data.validation", REPLAY)):
        yield case(f"{field} unpacks to a gigabyte", setting(field, _packed_text), *verb)
    for name, act in tokenizer_bombs().items():
        yield case(f"its tokenizer has {name}", functools.partial(_with_tokenizer, bases.hf, act), *GENERATE)
    for verb in (EVALUATE, REPLAY):
        act = tokenizer_bombs()["a pattern without end"]
        yield case("its tokenizer has a pattern without end", functools.partial(_with_tokenizer, bases.hf, act), *verb)


def monitors() -> dict[str, Callable[[RunFolder, Path], dict[str, Any]]]:
    """Tables with which DeepSpeed writes files or reaches a server."""

    def writer(name: str, field: str) -> Callable[[RunFolder, Path], dict[str, Any]]:
        return lambda run, place: {name: {"enabled": True, field: str(place / "elsewhere")}}

    return {"csv_monitor": writer("csv_monitor", "output_path"), "tensorboard": writer("tensorboard", "output_path")}


def _with_program(field: str, run: RunFolder, place: Path) -> None:
    (run.source / "variant.py").write_text(f"open({str(place / 'ran')!r}, 'w')\nclass Mine: pass\n")
    changed(run.config, assign(field, "variant:Mine"))


def _copied_checkpoint(run: RunFolder, place: Path) -> str:
    """A good checkpoint outside of the run's folder."""
    target = place / "theirs" / "checkpoints" / "step_000003"
    shutil.copytree(run.checkpoints / "step_000003", target)
    return str(target)


def _linked_checkpoint(run: RunFolder, place: Path) -> str:
    (run.path / "initial").symlink_to(_copied_checkpoint(run, place))
    return str(run.path / "initial")


def _packed_text(run: RunFolder, place: Path) -> str:
    path = run.path / "text.jsonl.gz"
    path.write_bytes(_one_line_of_a_gigabyte())
    return str(path)


@functools.cache
def _one_line_of_a_gigabyte() -> bytes:
    """A gzip file may have several parts, one behind the other."""
    return gzip.compress(b'{"text": "') + gzip.compress(b"a" * 2**24, 1) * 64 + gzip.compress(b'"}\n')


def _with_tokenizer(model: Path, act: Callable[[dict], None], run: RunFolder, place: Path) -> None:
    """A tokenizer.json of the run's own folder, changed by `act`."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / name, run.path / name)
    act(table := json.loads((run.path / "tokenizer.json").read_text()))
    (run.path / "tokenizer.json").write_text(json.dumps(table))
    changed(run.config, assign("data.tokenizer", str(run.path / "tokenizer.json")))
