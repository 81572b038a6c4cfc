"""An experiment's folder for weights that another program has trained: its config.py, written as code, every value a literal.

Names and numbers come from a stranger's file: whatever they hold, what is written evaluates to them and does nothing else.
"""

import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from models.config import GPT as Shape
from parallel.errors import Mistake
from research.config import GPT, Data, Experiment, Optimizer, Parallel, Schedule, Track
from research.settings import is_group
from research.text import one_line

LAUNCHER = "launch.py"
HEAD = '''"""{doc}"""

from research.config import {names}

config = '''
TEXT = ("builtin:state_of_the_union/train", "builtin:state_of_the_union/val")


def experiment(model: Shape, source: str, checkpoint: str, tokenizer: str, runs: str) -> Experiment:
    """What an import asks: as the weights are, and how they would be trained further: carefully, for a little while."""
    return Experiment(
        question=f"What does {one_line(source)[:80]} know, and what does it learn when it is trained further?",
        parent=None,
        model=GPT(**model.model_dump()),
        init_from=checkpoint,
        data=Data(train=TEXT[0], validation=TEXT[1], tokenizer=tokenizer),
        schedule=Schedule(steps=100, batch_size=8, micro_batch_size=1, validate_every=50),
        optimizer=Optimizer(
            lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=1.0, decay="cosine", warmup_steps=10, min_lr=1e-6,
            label_smoothing=0.0,
        ),
        parallel=Parallel(),
        precision="fp32",
        track=Track(runs=runs),
        seed=1,
    )  # fmt: skip


def source_of(config: Experiment) -> str:
    """config.py: a program that makes `config`. Settings that have their default are left out."""
    model = config.model
    doc = f"Imported weights: {model.num_layers} layers of width {model.hidden_size}, made by `python -m research import`."
    names = sorted({"Experiment", *_groups(config)}, key=lambda name: (name != "GPT", name))
    return HEAD.format(doc=doc, names=", ".join(names)) + _call(config, 0) + "\n"


def write(folder: Path, config: Experiment, tree: Path) -> None:
    """Fills the experiment's folder; launch.py is that of the other experiments of `tree`."""
    (folder / "config.py").write_text(source_of(config), encoding="ascii")
    (folder / LAUNCHER).write_bytes(launcher(tree))


def launcher(tree: Path) -> bytes:
    """The launch.py that all experiments of `tree` have."""
    for path in sorted((tree / "experiments").glob(f"*/{LAUNCHER}")):
        return path.read_bytes()
    raise Mistake(f"{tree / 'experiments'} has no experiment with a {LAUNCHER} → put experiments/gpt_sotu back")


def _call(group: BaseModel, depth: int) -> str:
    """`Name(` a setting a line `)`."""
    inside = "    " * (depth + 1)
    lines = [f"{inside}{name}={_code(value, depth + 1)},\n" for name, value in _given(group)]
    return f"{type(group).__name__}(\n{''.join(lines)}{'    ' * depth})" if lines else f"{type(group).__name__}()"


def _given(group: BaseModel) -> list[tuple[str, Any]]:
    """Settings that have no default, or another value."""
    fields = type(group).model_fields
    default = {name: field.get_default(call_default_factory=True) for name, field in fields.items() if not field.is_required()}
    return [(name, value) for name, value in group if name not in default or value != default[name]]


def _groups(group: BaseModel) -> set[str]:
    return {type(value).__name__ for name, value in _given(group) if is_group(type(group).model_fields[name])}


def _code(value: Any, depth: int) -> str:
    """A literal that evaluates to `value`, in ASCII."""
    if isinstance(value, BaseModel):
        return _call(value, depth)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} has no literal")
    if value is None or isinstance(value, (bool, int, float, str)):
        return _quoted(ascii(value))
    if isinstance(value, tuple):
        return f"({' '.join(f'{_code(entry, depth)},' for entry in value)[: -1 if len(value) > 1 else None]})"
    raise TypeError(f"a {type(value).__name__} has no literal here")


def _quoted(literal: str) -> str:
    """With the quotes of this house where nothing in it needs care."""
    return f'"{literal[1:-1]}"' if literal[0] == "'" and not {'"', "\\"} & set(literal) else literal
