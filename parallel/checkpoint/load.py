"""Loads a checkpoint into an engine: all of its state to resume, or the weights alone to begin a new run with them."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from parallel.checkpoint.manifest import KINDS
from parallel.checkpoint.reader import (
    Reader,
    check_shape,
)
from parallel.checkpoint.writer import (
    GENERATORS,
)
from parallel.engines.engine import Engine
from parallel.engines.optimizer_state import check_counters, ensure_moments, fragment, publish_weights, set_counters
from parallel.engines.process_state import differences, set_generators
from parallel.errors import Mistake
from parallel.object_collectives import all_gather_objects, together
from parallel.slices import slice_of


def load_checkpoint(folder: Path, engine: Engine) -> dict[str, Any]:
    """Sets all that `engine` must remember to what the checkpoint `folder` holds, and returns its facts. Collective, between two steps.

    Every file's SHA-256 is checked first, the files shared out over the ranks; nothing is set before all of them are whole, and what
    one rank finds, all raise, as a Mistake naming the file. Then each rank reads its own part. On the layout and the machine
    that wrote it training goes on bit for bit; the ranks' random generators are set only where the layout is the same.
    """
    with _checked(folder, engine) as (reader, named):
        with together(engine.grid):
            _check_moments(reader)
            _check_model(reader, engine, named)
            counters = check_counters(reader.facts.get("counters"))
            _restore_generators(reader, engine)
        ensure_moments(engine)
        with together(engine.grid):
            _read_state(reader, engine, KINDS)
        set_counters(engine, counters)
        publish_weights(engine)
        return reader.facts


@contextlib.contextmanager
def _checked(folder: Path, engine: Engine) -> Iterator[tuple[Reader, set[str]]]:
    """The checkpoint, open, every file of it whole; and the names of all ranks' parameters. Collective."""
    grid = engine.grid
    with together(grid):
        reader = Reader(folder)
    with reader:
        with together(grid):
            reader.check(grid.rank, grid.world)
        yield reader, {name for names in all_gather_objects(list(engine.parameters), grid) for name in names}


def load_initial(folder: Path, engine: Engine) -> dict[str, Any]:
    """Sets the weights alone to those of the checkpoint `folder`, and returns its facts. Collective, before the first step.

    For a run of its own that begins where another ended, or with imported weights: moments and counters stay as they begin.
    Checked as in `load`.
    """
    with _checked(folder, engine) as (reader, named):
        with together(engine.grid):
            _check_model(reader, engine, named)
            _read_state(reader, engine, ("weights",))
        publish_weights(engine)
        return reader.facts


def _check_moments(reader: Reader) -> None:
    """The checkpoint is of a training run."""
    if missing := [kind for kind in KINDS if kind not in reader.manifest.tensors]:
        raise Mistake(f"{reader.folder} holds weights but no {missing[0]} → resume from a checkpoint that a training run wrote")


def _check_model(reader: Reader, engine: Engine, named: set[str]) -> None:
    """The checkpoint is of this model."""
    for name, parameter in engine.parameters.items():
        check_shape(name, slice_of(parameter).shape, reader)
    if unknown := sorted(set(reader) - named):
        raise Mistake(f"{reader.folder} holds {unknown[0]}, which this model has not → use the model it was trained with")


def _read_state(reader: Reader, engine: Engine, kinds: Sequence[str]) -> None:
    """Each parameter's fragment on this rank, from the rows of its slice that it lies in."""
    grid = engine.grid
    for kind in kinds:
        for name, parameter in engine.parameters.items():
            cut, own = slice_of(parameter), fragment(parameter, kind)
            count = own.values.numel()
            if count == 0:
                continue
            row = cut.local_numel(grid.tensor) // cut.local_shape(grid.tensor)[0]
            first, last = own.start // row, -(-(own.start + count) // row)
            rows = reader.read_rows(name, cut, grid.tensor_rank, grid.tensor, (first, last), kind)
            own.values.copy_(rows.flatten()[own.start - first * row :][:count])


def _restore_generators(reader: Reader, engine: Engine) -> None:
    same = not any(name.startswith("layout.") or name == "machine.world" for name in differences(reader.facts, engine))
    if not same or GENERATORS not in reader.manifest.files:
        return
    try:
        ranks = json.loads(reader.read_file(GENERATORS))
        own = ranks[engine.grid.rank]
    except (ValueError, RecursionError, IndexError, KeyError, TypeError) as error:
        raise Mistake(f"{reader.folder / GENERATORS} cannot be read ({error!s:.100}) → use another checkpoint of the run") from error
    set_generators(own)
