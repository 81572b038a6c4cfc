"""A run's folder without training: settings, a tokenizer trained on a little text, and checkpoints of random weights."""

from pathlib import Path
from typing import Any

from parallel.checkpoint.writer import write
from research.config import schema, serialization
from research.config.experiment_folder import load_variants
from research.data.run_tokenizer import load_tokenizer
from research.tracking import run_folder
from research.tracking.own_runs import mark_as_own
from research.tracking.run_folder import RunFolder
from tests.models.helpers.build import random_weights
from tests.research.helpers.example import example

TEXT = "the people of the union — ½ of them, in peace and in war: jobs, health, the budget.\n" * 40
SMALL: dict[str, Any] = dict(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=48, vocab_size=391, seq_length=32)


def make(
    place: Path, name: str = "small", steps: tuple[int, ...] = (3,), precision: str = "fp32", variant: str = "", **model: Any
) -> RunFolder:
    """Creates `place`/runs/NAME/ID. The weights of step n have seed n; they are large, so that greedy texts do not repeat one token."""
    texts = {key: str(place / f"{key}.txt") for key in ("train", "validation")}
    for path in texts.values():
        Path(path).write_text(TEXT, encoding="utf-8")
    data = schema.Data(**texts, tokenizer="builtin:bpe-384", cache=str(place / "cache"))
    experiment = example(model=SMALL | model, data=data, precision=precision)
    folder = run_folder.create(place / "runs", name)
    folder.source.mkdir()
    (folder.source / "variant.py").write_text(variant)
    serialization.save(experiment, folder.config)
    mark_as_own(folder)
    run_folder.start(folder, layout="pipe 1 × data 1 × tensor 1 · ZeRO-1", precision=precision, steps=max(steps))
    for step in steps:
        save(folder, experiment, step)
    run_folder.end(folder, run_folder.FINISHED)
    load_tokenizer(data, place)
    return folder


def save(folder: RunFolder, experiment: schema.Experiment, step: int) -> None:
    """Writes a checkpoint of random weights with seed `step`."""
    variants = load_variants(folder.source, experiment.model)
    weights = {name: tensor.float() for name, tensor in random_weights(experiment.model, step, variants).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    write(folder.checkpoints / f"step_{step:06d}", shapes, weights.values(), {"step": step, "samples": 0, "tokens": 0})
