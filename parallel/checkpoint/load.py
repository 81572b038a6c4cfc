"""Loads a checkpoint into an engine: its whole state to resume, or the weights alone to begin a new run with them."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

from parallel.checkpoint.manifest import WEIGHTS
from parallel.checkpoint.reader import Reader, check_shape
from parallel.checkpoint.writer import GENERATORS
from parallel.engines.engine import Engine
from parallel.engines.optimizer_state import check_counters, ensure_moments, fragment, kinds_of, publish_weights, set_counters
from parallel.engines.process_state import differences, set_generators
from parallel.errors import Damaged, Mistake
from parallel.object_collectives import all_gather_objects, together
from parallel.slices import slice_of


def load_checkpoint(folder: Path, engine: Engine) -> dict[str, Any]:
    """Sets the whole state of `engine` to that of the checkpoint `folder` and returns its facts. Collective, between two steps.

    The SHA-256 of every file is checked first, each rank checking some of the files. Nothing is set before all files are checked;
    if one rank finds damage, all ranks raise a Mistake that names the file. Then each rank reads its own part. On the layout and
    machine that wrote the checkpoint, training on CPUs continues bit for bit. The ranks' random generators are set only if the
    layout is the same.
    """
    with _checked(folder, engine) as (reader, names):
        with together(engine.grid):
            kinds = kinds_of(engine)
            if missing := [kind for kind in kinds if kind not in reader.manifest.tensors]:
                raise Mistake(
                    f"{reader.folder} holds weights but no {missing[0]} → "
                    "resume from a checkpoint that a training run wrote, with the same optimizer"
                )
            _check_model(reader, engine, names)
            counters = check_counters(reader.facts.get("counters"))
            _restore_generators(reader, engine)
        ensure_moments(engine)
        with together(engine.grid):
            _read_state(reader, engine, kinds)
        set_counters(engine, counters)
        publish_weights(engine)
        return reader.facts


@contextlib.contextmanager
def _checked(folder: Path, engine: Engine) -> Iterator[tuple[Reader, set[str]]]:
    """Opens the checkpoint and checks its files; yields the reader and the names of all ranks' parameters. Collective."""
    grid = engine.grid
    with together(grid):
        reader = Reader(folder)
    with reader:
        with together(grid):
            reader.check(grid.rank, grid.world)
        by_rank = all_gather_objects(list(engine.parameters), grid)
        yield reader, {name for names in by_rank for name in names}


def load_initial(folder: Path, engine: Engine) -> dict[str, Any]:
    """Sets the weights alone to those of the checkpoint `folder` and returns its facts. Collective, before the first step.

    This is for a new run that begins with the weights of another run, or with imported weights: moments and counters keep their
    initial values. The files are checked as in `load_checkpoint`.
    """
    with _checked(folder, engine) as (reader, names):
        with together(engine.grid):
            _check_model(reader, engine, names)
            _read_state(reader, engine, (WEIGHTS,))
        publish_weights(engine)
        return reader.facts


def _check_model(reader: Reader, engine: Engine, names: set[str]) -> None:
    """Raises a Mistake if the checkpoint's tensors are not those of this model, whose parameters on all ranks are `names`."""
    for name, parameter in engine.parameters.items():
        check_shape(name, slice_of(parameter).shape, reader)
    if unknown := sorted(set(reader) - names):
        raise Mistake(f"{reader.folder} holds {unknown[0]}, which this model has not → use the model it was trained with")


def _read_state(reader: Reader, engine: Engine, kinds: Sequence[str]) -> None:
    """Sets each parameter's fragment on this rank, reading only the rows of the slice that contain it."""
    grid = engine.grid
    for kind in kinds:
        for name, parameter in engine.parameters.items():
            cut, part = slice_of(parameter), fragment(parameter, kind)
            count = part.values.numel()
            if count == 0:
                continue
            row = prod(cut.local_shape(grid.tensor)[1:])
            first, last = part.start // row, -(-(part.start + count) // row)
            rows = reader.read_rows(name, cut, grid.tensor_rank, grid.tensor, (first, last), kind)
            part.values.copy_(rows.flatten()[part.start - first * row :][:count])


def _restore_generators(reader: Reader, engine: Engine) -> None:
    """Sets this rank's random generators if the checkpoint has them and the layout is the same."""
    same_layout = not any(name.startswith("layout.") or name == "machine.world" for name in differences(reader.facts, engine))
    if not same_layout or GENERATORS not in reader.manifest.files:
        return
    try:
        states = json.loads(reader.read_file(GENERATORS))[engine.grid.rank]
    except (ValueError, RecursionError, IndexError, KeyError, TypeError) as error:
        raise Damaged(f"{reader.folder / GENERATORS} cannot be read ({error!s:.100}) → use another checkpoint of the run") from error
    set_generators(states)
